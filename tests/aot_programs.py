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
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.parallel.mesh import make_mesh
from jinfer.parallel.sharding import Placement
from jinfer.parallel.shares import held_model
from jinfer.resolve import resolve_plan
from jinfer.startup import state_shapes, step_programs
from jinfer.step.programs import Program
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


class Gpu(NamedTuple):
    """What the compiler is told of a chip."""

    capability: str
    num_cores: int
    core_threads: int
    core_fpus: int
    core_shared_bytes: int
    block_shared_bytes: int
    memory_bytes: int
    bytes_per_s: int
    l2_bytes: int
    clock_ghz: float


_GB = 10**9
# From the vendor's data sheets and tuning guides.
GPUS = {
    "T4": Gpu("7.5", 40, 1024, 64, 65536, 65536, 16 * _GB, 320 * _GB, 4 << 20, 1.59),
    "A100": Gpu("8.0", 108, 2048, 64, 167936, 166912, 80 * _GB, 2039 * _GB, 40 << 20, 1.41),
    "L4": Gpu("8.9", 58, 1536, 128, 102400, 101376, 24 * _GB, 300 * _GB, 48 << 20, 2.04),
    "H200": Gpu("9.0", 132, 2048, 128, 233472, 232448, 141 * _GB, 4800 * _GB, 60 << 20, 1.98),
    "B200": Gpu("10.0", 148, 2048, 128, 233472, 232448, 180 * _GB, 8000 * _GB, 126 << 20, 1.96),
}


def describe_gpu(name: str) -> Any:
    """The chip as a device to compile for."""
    gpu = GPUS[name]
    major, minor = gpu.capability.split(".")
    target = f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      threads_per_block_limit: 1024  threads_per_warp: 32
      shared_memory_per_block: 49152  shared_memory_per_core: {gpu.core_shared_bytes}
      shared_memory_per_block_optin: {gpu.block_shared_bytes}
      threads_per_core_limit: {gpu.core_threads}
      core_count: {gpu.num_cores}  fpus_per_core: {gpu.core_fpus}
      block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
      memory_bandwidth: {gpu.bytes_per_s}  l2_cache_size: {gpu.l2_bytes}
      clock_rate_ghz: {gpu.clock_ghz}  device_memory_size: {gpu.memory_bytes}
      registers_per_core_limit: 65536  registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "NVIDIA {name}"
    """
    topology = {"target_config": target, "topology": "1x1x1"}
    return topologies.get_topology_desc(topology_name="", platform="cuda", **topology).devices[0]


def programs_for(chips: Sequence[Any], model: ModelConfig, plan: EnginePlan) -> list[Program]:
    """The engine's own, for a model on these chips."""
    size = plan.tensor_parallel_size
    placement = Placement(make_mesh(chips, size))
    state = state_shapes(plan, held_model(model, size), placement)
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
    chip = describe_gpu(name)
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
