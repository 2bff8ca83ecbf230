"""Moves of pages, compiled for TPUs and H200 without owning one: the pool is updated in place."""

import os
from dataclasses import replace
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from test_aot_programs import (
    CONFIG,
    H200,
    LLAMA_3_8B,
    TARGETS,
    no_compilation_cache,  # noqa: F401  a fixture of every test here
    shapes_of,
)

from jinfer.config import EnginePlan, ModelConfig
from jinfer.resolve import resolve_plan
from jinfer.startup import step_programs

pytestmark = pytest.mark.slow
OFFLOADING = replace(CONFIG, kv_offloading_size=4.0)


@pytest.mark.parametrize("target", TARGETS)
def test_on_tpus(target: str) -> None:
    pytest.importorskip("libtpu", reason='the TPU compiler is not here; pip install "jax[tpu]"')
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    chip = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    num_layers, free_bytes = TARGETS[target]
    model = replace(LLAMA_3_8B, num_layers=num_layers)
    plan = resolve_plan(OFFLOADING, model, platform="tpu", free_bytes=free_bytes)
    check_moves(chip, model, plan)


def test_on_h200() -> None:
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="the GPU compiler is not here; pip install it"
    )
    topology = {"target_config": H200, "topology": "1x1x1"}
    chip = topologies.get_topology_desc(topology_name="", platform="cuda", **topology).devices[0]
    plan = resolve_plan(OFFLOADING, LLAMA_3_8B, platform="gpu", free_bytes=64 << 30)
    check_moves(chip, LLAMA_3_8B, plan)


def check_moves(chip: Any, model: ModelConfig, plan: EnginePlan) -> None:
    sharding = jax.sharding.SingleDeviceSharding(chip)
    programs = step_programs(plan, model, *shapes_of(model, plan))
    moves = {p.name: p for p in programs if p.name.endswith("_pages")}
    assert set(moves) == {"copy_pages", "gather_pages", "scatter_pages"}
    for name, program in moves.items():
        placed = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), program.shapes
        )
        compiled = jax.jit(program.function, donate_argnums=program.donate).lower(*placed).compile()
        memory = compiled.memory_analysis()
        print(f"{name}: temporaries {memory.temp_size_in_bytes / 1e6:.2f} MB")
        assert memory.temp_size_in_bytes < 2 * plan.page_bytes
        if name != "gather_pages":
            assert memory.alias_size_in_bytes >= plan.num_pages * plan.page_bytes
