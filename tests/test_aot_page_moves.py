"""Moves of pages, compiled for TPUs and H200 without owning one: the pool is updated in place."""

from dataclasses import replace
from typing import Any

import pytest
from aot_programs import CONFIG, LLAMA_3_8B, programs_for
from test_aot_programs import (
    GPU_COMPILER,
    TPUS,
    describe_tpu,
    no_compilation_cache,  # noqa: F401  a fixture of every test here
)

from jinfer.bench.chips import describe
from jinfer.config import EnginePlan, ModelConfig
from jinfer.startup.plan import resolve_plan

pytestmark = pytest.mark.slow
OFFLOADING = replace(CONFIG, kv_offloading_size=4.0)


@pytest.mark.parametrize(("target", "limits"), [(one[0], TPUS[one]) for one in TPUS])
def test_on_tpus(target: str, limits: tuple[int, int]) -> None:
    chip = describe_tpu(target)
    num_layers, free_bytes = limits
    model = replace(LLAMA_3_8B, num_layers=num_layers)
    kind = {"platform": "tpu", "device_kind": chip.device_kind}
    check_moves(chip, model, resolve_plan(OFFLOADING, model, **kind, free_bytes=free_bytes))


def test_on_h200() -> None:
    pytest.importorskip(GPU_COMPILER, reason="the GPU compiler is not here; pip install it")
    plan = resolve_plan(OFFLOADING, LLAMA_3_8B, platform="gpu", free_bytes=64 << 30)
    check_moves(describe("h200")[0], LLAMA_3_8B, plan)


def check_moves(chip: Any, model: ModelConfig, plan: EnginePlan) -> None:
    moves = {p.name: p for p in programs_for([chip], model, plan) if p.name.endswith("_pages")}
    assert set(moves) == {"copy_pages", "gather_pages", "scatter_pages"}
    for name, program in moves.items():
        memory = program.compile().memory_analysis()
        print(f"{name}: temporaries {memory.temp_size_in_bytes / 1e6:.2f} MB")
        assert memory.temp_size_in_bytes < 2 * plan.page_bytes
        if name != "gather_pages":
            assert memory.alias_size_in_bytes >= plan.num_pages * plan.page_bytes
