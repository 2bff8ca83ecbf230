"""Compiles what a file of `configs/` asks for, on the chips it is meant for: what it takes.

`python tests/aot_configs.py NAME` prints a line of JSON per program, its largest step and its
largest loop of decode steps; `--record` writes those of all files to configs/memory.json. Each
file has a process of its own, since one compiles for the first kind of GPU it was asked for.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from aot_programs import LLAMA_3_8B, programs_for
from collectives import collectives_in

from jinfer.arguments.config_file import read_config
from jinfer.bench.chips import describe_slice
from jinfer.config import EngineConfig, RopeScaling
from jinfer.parallel.model_shards import chip_shard, padded_model
from jinfer.startup.checks import check_config
from jinfer.startup.chips import CHIPS
from jinfer.startup.defaults import resolve_dtype
from jinfer.startup.plan import resolve_plan
from kernels_pallas.compat import told_the_chip

FOLDER = Path(__file__).parents[1] / "configs"
RECORD = FOLDER / "memory.json"
# Of a chip's memory: what its runtime and the compiler keep for themselves.
KEPT_SHARE = 0.05

_ROPE = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA_8B = replace(LLAMA_3_8B, max_position_embeddings=131_072, rope_scaling=_ROPE)
LLAMA_70B = replace(
    LLAMA_8B, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_q_heads=64
)
LLAMA_3B = replace(
    LLAMA_8B,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=28,
    num_q_heads=24,
    tie_word_embeddings=True,
    rope_scaling=replace(_ROPE, factor=32.0),
)
LLAMA_1B = replace(LLAMA_3B, hidden_size=2048, num_layers=16, num_q_heads=32, head_dim=64)
# As their config.json says.
MODELS = {
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA_1B,
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA_3B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA_70B,
}


class Target(NamedTuple):
    chip: str
    topology: str
    device_kind: str


TARGETS = {
    "colab-t4": Target("t4", "1x1x1", "Tesla T4"),
    "colab-tpu-v5e-1": Target("v5e", "v5e:2x2", "TPU v5 lite"),
    "v5e-8": Target("v5e", "v5e:2x4", "TPU v5 lite"),
    "v6e-8": Target("v6e", "v6e:2x4", "TPU v6 lite"),
    "v5p-16": Target("v5p", "v5p:2x2x2", "TPU v5p"),
    "h200": Target("h200", "1x1x1", "NVIDIA H200"),
    "h100-8": Target("h100", "1x1x8", "NVIDIA H100 80GB HBM3"),
}


_SIZES: dict[str, Any] = {"model": "-", "max_num_batched_tokens": 512, "max_model_len": 8192}
_EIGHT = EngineConfig(**_SIZES, max_num_seqs=64, tensor_parallel_size=8)
_SIXTEEN = EngineConfig(**_SIZES, max_num_seqs=64, tensor_parallel_size=16)
# Meshes beside those of the files. Unrolled layers compile for minutes, so GPUs get eight of 80.
MESHES = {
    "70B on v5e:4x4": (Target("v5e", "v5e:4x4", "TPU v5 lite"), _SIXTEEN, LLAMA_70B),
    "70B on v6e:2x4": (Target("v6e", "v6e:2x4", "TPU v6 lite"), _EIGHT, LLAMA_70B),
    "a tenth of 70B on 8 x H200": (
        Target("h200", "1x1x8", "NVIDIA H200"),
        _EIGHT,
        replace(LLAMA_70B, num_layers=8),
    ),
}


def is_tpu(target: Target) -> bool:
    return CHIPS[target.chip].platform == "tpu"


def measure(name: str) -> Iterator[dict[str, Any]]:
    """What the programs of one file, or of one of MESHES, need on each chip."""
    if name in MESHES:
        target, config, model = MESHES[name]
    else:
        target, asked = TARGETS[name], read_config(FOLDER / f"{name}.yaml")
        config, model = EngineConfig(**asked), MODELS[asked["model"]]
    check_config(config)
    chip = CHIPS[target.chip]
    devices = describe_slice(target.chip, target.topology)
    size = config.tensor_parallel_size
    shard = chip_shard(padded_model(model, size), size)
    itemsize = jnp.dtype(resolve_dtype(config, chip.platform)).itemsize
    weight_bytes = shard.num_parameters * itemsize
    memory_bytes = int(chip.memory_gb * 1e9)
    plan = resolve_plan(
        config,
        model,
        platform=chip.platform,
        free_bytes=int(memory_bytes * (1 - KEPT_SHARE)) - weight_bytes,
        device_kind=target.device_kind,
    )
    wanted = {
        f"step of {plan.token_buckets[-1]} tokens",
        f"decode of {plan.decode_buckets[-1]} rows",
    }
    # A mesh tells a kernel the chip by itself.
    told: AbstractContextManager[Any] = told_the_chip(devices[0]) if size == 1 else nullcontext()
    with told:
        for program in programs_for(devices, model, plan):
            if program.name in wanted:
                start_s = time.perf_counter()
                compiled = program.compile()
                memory: Any = compiled.memory_analysis()
                yield {
                    "program": program.name,
                    "chip_bytes": memory_bytes,
                    "weight_bytes": weight_bytes,
                    "pool_bytes": plan.num_pages * plan.page_bytes,
                    "kv_tokens": plan.kv_capacity,
                    "argument_bytes": memory.argument_size_in_bytes,
                    "aliased_bytes": memory.alias_size_in_bytes,
                    "temporary_bytes": memory.temp_size_in_bytes,
                    "collectives": collectives_of(compiled),
                    "elapsed_s": round(time.perf_counter() - start_s, 1),
                }


def collectives_of(compiled: jax.stages.Compiled) -> list[tuple[str, str, int]] | None:
    """As `collectives_in`; None where this jaxlib cannot print a newer compiler's text."""
    try:
        return collectives_in(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError:
        return None


def run(name: str) -> list[dict[str, Any]]:
    """`measure` in a process of its own."""
    paths = [str(FOLDER.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, __file__, name]
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def record() -> None:
    """Writes configs/memory.json: gigabytes on each chip, by file and program."""
    kept = ("chip_bytes", "weight_bytes", "pool_bytes", "temporary_bytes")
    recorded: dict[str, Any] = {}
    for name in TARGETS:
        programs = run(name)
        recorded[name] = {
            "kv_tokens": programs[0]["kv_tokens"],
            "programs": {
                figures["program"]: {
                    key.replace("bytes", "gb"): round(figures[key] / 1e9, 3) for key in kept
                }
                for figures in programs
            },
        }
        print(name, json.dumps(recorded[name]), [f["elapsed_s"] for f in programs], flush=True)
    RECORD.write_text(json.dumps(recorded, indent=2) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    if sys.argv[1] == "--record":
        record()
    else:
        for line in measure(sys.argv[1]):
            print(json.dumps(line), flush=True)
