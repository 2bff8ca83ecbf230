"""Compiles the engine's own programs of an 8B model for chips that are not here.

For GPUs it is also a program, `python tests/aot_programs.py CHIP NUM_LAYERS ATTENTION`, since a
process compiles for the first architecture it was asked for, whatever it is asked later.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax

from jinfer.bench.chips import describe
from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.models.decoder import Decoder
from jinfer.resolve import resolve_plan
from jinfer.startup import pool_shape, step_programs
from jinfer.step.slots import empty_slots
from jinfer.weights.layout import hold_as
from kernels_pallas.compat import told_the_chip

LLAMA_3_8B = ModelConfig(
    family="llama",
    vocab_size=128_256,
    width=4096,
    mlp_width=14_336,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_width=128,
    max_position=8192,
    rms_eps=1e-5,
    rope_theta=500_000.0,
)
CONFIG = EngineConfig(model="-", max_num_seqs=16, max_num_batched_tokens=512)
STEP, DECODE = "step of 512 tokens", "decode of 16 rows"


def shapes_of(
    model: ModelConfig, plan: EnginePlan, sharding: jax.sharding.Sharding
) -> tuple[Any, Any, Any]:
    """Parameters as the plan holds them, pool and slots of the model, as shapes."""
    decoder, hold = Decoder(model), hold_as(plan.weight_layout, sharding)

    def held(name: str, shape: jax.ShapeDtypeStruct, *leading: int) -> jax.ShapeDtypeStruct:
        shape_of_all = (*leading, *shape.shape)
        where = hold(name, len(shape_of_all)) or sharding
        return jax.ShapeDtypeStruct(shape_of_all, plan.dtype, sharding=where)

    params = {name: held(name, shape) for name, shape in decoder.ends_shapes.items()}
    if plan.layer_loop == "scan":
        leading = (model.num_layers,)
        params["blocks"] = {n: held(n, s, *leading) for n, s in decoder.block_shapes.items()}
    else:
        block = {name: held(name, shape) for name, shape in decoder.block_shapes.items()}
        params["blocks"] = [block] * model.num_layers
    slots = jax.eval_shape(
        lambda: empty_slots(
            max_slots=plan.max_slots,
            pages_per_slot=plan.pages_per_slot,
            vocab_size=model.vocab_size,
        )
    )
    return params, pool_shape(plan, model), slots


def measure(chip: Any, model: ModelConfig, plan: EnginePlan) -> Iterator[dict[str, Any]]:
    """Compiles a step and a loop of decode steps, and reads their memory off them."""
    sharding = jax.sharding.SingleDeviceSharding(chip)
    programs = step_programs(plan, model, *shapes_of(model, plan, sharding))
    for program in programs:
        if program.name not in (STEP, DECODE):
            continue
        start_s = time.perf_counter()
        memory = (
            jax.jit(program.function, donate_argnums=program.donate)
            .lower(*jax.tree.map(lambda a: _placed(a, sharding), program.shapes))
            .compile()
            .memory_analysis()
        )
        yield {
            "program": program.name,
            "aliased_bytes": memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "pool_bytes": plan.num_pages * plan.page_bytes,
            "weight_bytes": 2 * model.num_parameters,
            "elapsed_s": time.perf_counter() - start_s,
        }


def _placed(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> Any:
    where = shape.format if shape.format.layout is not None else sharding
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


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
