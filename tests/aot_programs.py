"""Compiles the engine's own programs of an 8B model for chips that are not here.

For GPUs it is also a program, `python tests/aot_programs.py CHIP NUM_LAYERS ATTENTION`, since a
process compiles for the first architecture it was asked for, whatever it is asked later.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax

from jinfer.bench.chips import describe
from jinfer.compile.programs import Program
from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.parallel.mesh import make_mesh
from jinfer.parallel.model_shards import padded_model
from jinfer.parallel.sharding import Placement
from jinfer.startup.plan import resolve_plan
from jinfer.startup.programs import state_shapes, step_programs
from kernels_pallas.compat import told_the_chip

LLAMA_3_8B = ModelConfig(
    family="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
)
CONFIG = EngineConfig(model="-", max_num_seqs=16, max_num_batched_tokens=512)
STEP, DECODE = "step of 512 tokens", "decode of 16 rows"


def programs_for(chips: Sequence[Any], model: ModelConfig, plan: EnginePlan) -> list[Program]:
    """The engine's own, for a model on these chips."""
    size = plan.tensor_parallel_size
    placement = Placement(make_mesh(chips, size))
    state = state_shapes(plan, padded_model(model, size), placement)
    return step_programs(plan, model, state, placement)


def measure(chip: Any, model: ModelConfig, plan: EnginePlan) -> Iterator[dict[str, Any]]:
    """Compiles a step and a loop of decode steps, and reads their memory off them."""
    for program in programs_for([chip], model, plan):
        if program.name not in (STEP, DECODE):
            continue
        start_s = time.perf_counter()
        memory = program.compile().memory_analysis()
        yield {
            "program": program.name,
            "aliased_bytes": memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "pool_bytes": plan.num_pages * plan.page_bytes,
            "weight_bytes": 2 * model.num_parameters,
            "elapsed_s": time.perf_counter() - start_s,
        }


def main(name: str, num_layers: str, attention: str) -> None:
    """Prints the name of the attention, then a line of JSON per program."""
    jax.config.update("jax_enable_compilation_cache", False)
    chip, _ = describe(name.lower())
    model = replace(LLAMA_3_8B, num_layers=int(num_layers))
    asked = None if attention == "auto" else attention
    # A T4 multiplies no bfloat16.
    config = replace(CONFIG, attention=asked, dtype="float16" if name == "T4" else "auto")
    plan = resolve_plan(config, model, platform="gpu", free_bytes=8 << 30)
    print(plan.attention)
    # Only kernels need to know the chip while they are traced.
    told: AbstractContextManager[Any] = told_the_chip(chip) if attention == "gpu" else nullcontext()
    with told:
        for figures in measure(chip, model, plan):
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
