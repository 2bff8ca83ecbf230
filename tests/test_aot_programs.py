"""The engine's own steps, of an 8B model, compiled ahead of time for chips that are not here.

What is read off a program: the pool is aliased whole, and temporaries are few beside the weights.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aot_programs
import jax
import jax.numpy as jnp
import pytest
from aot_programs import CONFIG, DECODE, LLAMA_3_8B, STEP
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jinfer.startup.plan import resolve_plan
from jinfer.weights.dummy import _Part, _uniform
from jinfer.weights.layout import hold_as, put_layer
from kernels_pallas.compat import told_the_chip

pytestmark = pytest.mark.slow

GPU_COMPILER = "jax_plugins.xla_cuda13"


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache():
    """A program compiled without its device is written to the cache, but cannot be read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


# Per target and dtype of the KV cache: layers, and HBM left for pool and activations once the
# weights are in place; v5e holds 16 GB in all, so there the model is cut to the layers that fit.
# One old chip, one of the usual layout and one of another; tests/test_configs.py compiles for more.
TPUS = {
    ("v5e:2x2", "int8"): (20, 3 << 30),
    ("v6e:2x2", "auto"): (32, 12 << 30),
    ("tpu7x:2x2x1", "auto"): (32, 64 << 30),
}


def describe_tpu(target: str) -> Any:
    pytest.importorskip("libtpu", reason='the TPU compiler is not here; pip install "jax[tpu]"')
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    return topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]


@pytest.mark.parametrize(("target", "kv_cache_dtype"), TPUS)
def test_8b_programs_on_tpus_copy_neither_weights_nor_pool(
    target: str, kv_cache_dtype: str
) -> None:
    chip = describe_tpu(target)
    num_layers, free_bytes = TPUS[target, kv_cache_dtype]
    model = replace(LLAMA_3_8B, num_layers=num_layers)
    config = replace(CONFIG, kv_cache_dtype=kv_cache_dtype)
    kind = {"platform": "tpu", "device_kind": chip.device_kind}
    plan = resolve_plan(config, model, **kind, free_bytes=free_bytes)
    assert plan.attention == "tpu" and plan.layer_loop == "scan"
    assert plan.weight_layout == ("16x128" if target.startswith("tpu7x") else "default")
    with told_the_chip(chip):
        check(f"{target} {kv_cache_dtype} KV", list(aot_programs.measure(chip, model, plan)))


# An unrolled layer compiles for seconds. Eight of them prove what 32 do: pool and weights shrink
# with them, what a step needs besides does not. tests/test_configs.py compiles a whole 8B model.
NUM_LAYERS_ON_GPUS = 8


# The oldest chip, which has no bfloat16, and the two newest kinds.
@pytest.mark.parametrize("name", ["T4", "H200", "B200"])
def test_8b_programs_on_gpus_copy_neither_weights_nor_pool(name: str) -> None:
    attention, figures = run_for_gpu(name, NUM_LAYERS_ON_GPUS, "auto")
    assert attention == "xla_wide"
    check(name, figures)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernel needs jax 0.11")
def test_8b_programs_with_the_hopper_kernel_copy_neither_weights_nor_pool() -> None:
    attention, figures = run_for_gpu("H200", NUM_LAYERS_ON_GPUS, "gpu")
    assert attention == "gpu"
    check("H200 with the Hopper kernel", figures)


def run_for_gpu(name: str, num_layers: int, attention: str) -> tuple[str, list[dict[str, Any]]]:
    pytest.importorskip(GPU_COMPILER, reason="the GPU compiler is not here; pip install it")
    program = [sys.executable, aot_programs.__file__, name, str(num_layers), attention]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    chosen, *lines = result.stdout.splitlines()
    return chosen, [json.loads(line) for line in lines]


def check(label: str, figures: list[dict[str, Any]]) -> None:
    assert {program["program"] for program in figures} == {STEP, DECODE}
    for program in figures:
        print(
            f"{label}, {program['program']}: "
            f"temporaries {program['temporary_bytes'] / 1e6:.1f} MB, "
            f"weights {program['weight_bytes'] / 1e9:.1f} GB, "
            f"pool {program['pool_bytes'] / 1e9:.1f} GB, {program['elapsed_s']:.0f} s"
        )
        assert program["aliased_bytes"] >= program["pool_bytes"]
        assert program["temporary_bytes"] < 0.05 * program["weight_bytes"]


def test_weights_come_into_the_layout_of_a_7x_without_a_copy_of_them_all() -> None:
    sharding = jax.sharding.SingleDeviceSharding(describe_tpu("tpu7x:2x2x1"))
    padded = hold_as("16x128", lambda _: sharding)("blocks.w_down_DF", "LDF")
    shape = (8, 4096, 14_336)
    stack = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=padded)
    layer = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.bfloat16, sharding=sharding)
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
    load = jax.jit(put_layer, donate_argnums=0, out_shardings=padded).lower(stack, layer, index)
    part = _Part("LDF", shape, shape)
    draw = partial(_uniform, parts=(part,), num_shards=1, head_dim=128, dtype=stack.dtype)
    drawn = jax.jit(draw, out_shardings=padded).lower(0, (1,), 0.5)
    loading, drawing = (x.compile().memory_analysis() for x in (load, drawn))
    layer_bytes = 4096 * 14_336 * 2
    assert loading.alias_size_in_bytes >= 8 * layer_bytes
    assert loading.temp_size_in_bytes <= layer_bytes
    assert drawing.temp_size_in_bytes < layer_bytes
