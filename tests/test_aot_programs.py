"""The engine's own step, of an 8B model, compiled ahead of time for chips that are not here."""

import os
import time
from dataclasses import replace
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.models.decoder import Decoder
from jinfer.resolve import resolve_plan
from jinfer.startup import pool_shape, step_programs
from jinfer.step.slots import empty_slots
from kernels_pallas.compat import told_the_chip

pytestmark = pytest.mark.slow

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


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache():
    """A program compiled without its device is written to the cache, but cannot be read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


CONFIG = EngineConfig(model="-", max_num_seqs=16, max_num_batched_tokens=512)
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 62914560  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
# HBM left for pool and activations once the weights are in place; v5e holds 16 GB in all, so
# there the model is cut to the layers that fit.
TARGETS = {
    "v5e:2x2": (20, 3 << 30),
    "v5p:2x2x1": (32, 64 << 30),
    "v6e:2x2": (32, 12 << 30),
}


def shapes_of(model: ModelConfig, plan: EnginePlan) -> tuple[Any, Any, Any]:
    """Parameters, pool and slots of the model under a plan, as shapes."""
    decoder = Decoder(model)

    def of_dtype(shape: jax.ShapeDtypeStruct, *leading: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *shape.shape), plan.dtype)

    params = {name: of_dtype(shape) for name, shape in decoder.ends_shapes.items()}
    if plan.layer_loop == "scan":
        leading = (model.num_layers,)
        params["blocks"] = {n: of_dtype(s, *leading) for n, s in decoder.block_shapes.items()}
    else:
        block = {name: of_dtype(shape) for name, shape in decoder.block_shapes.items()}
        params["blocks"] = [block] * model.num_layers
    pages = pool_shape(plan, model)
    slots = jax.eval_shape(
        lambda: empty_slots(
            max_slots=plan.max_slots,
            pages_per_slot=plan.pages_per_slot,
            vocab_size=model.vocab_size,
        )
    )
    return params, pages, slots


NAMES = ("step of 512 tokens", "decode of 16 rows")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_8b_programs_on_tpus_copy_neither_weights_nor_pool(target: str, name: str) -> None:
    reason = 'the TPU compiler is not here; pip install "jax[tpu]"'
    pytest.importorskip("libtpu", reason=reason)
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    chip = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    num_layers, free_bytes = TARGETS[target]
    model = replace(LLAMA_3_8B, num_layers=num_layers)
    plan = resolve_plan(CONFIG, model, platform="tpu", free_bytes=free_bytes)
    assert plan.attention == "tpu" and plan.layer_loop == "scan"
    with told_the_chip(chip):
        check_program(target, name, chip, model, plan)


@pytest.mark.parametrize("name", NAMES)
def test_8b_programs_on_h200_copy_neither_weights_nor_pool(name: str) -> None:
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="the GPU compiler is not here; pip install it"
    )
    topology = {"target_config": H200, "topology": "1x1x1"}
    chip = topologies.get_topology_desc(topology_name="", platform="cuda", **topology).devices[0]
    plan = resolve_plan(CONFIG, LLAMA_3_8B, platform="gpu", free_bytes=64 << 30)
    assert plan.attention == "xla_wide" and plan.layer_loop == "unrolled"
    check_program("H200", name, chip, LLAMA_3_8B, plan)


def check_program(target: str, name: str, chip: Any, model: ModelConfig, plan: EnginePlan) -> None:
    """Compiles one program and reads its memory off it."""
    programs = step_programs(plan, model, *shapes_of(model, plan))
    [program] = [p for p in programs if p.name == name]
    sharding = jax.sharding.SingleDeviceSharding(chip)
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), program.shapes
    )
    start_s = time.perf_counter()
    memory = (
        jax.jit(program.function, donate_argnums=program.donate)
        .lower(*placed)
        .compile()
        .memory_analysis()
    )
    elapsed_s = time.perf_counter() - start_s
    pool_bytes = plan.num_pages * plan.page_bytes
    weight_bytes = 2 * model.num_parameters
    print(
        f"{target} {name}: temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB, "
        f"weights {weight_bytes / 1e9:.1f} GB, pool {pool_bytes / 1e9:.1f} GB, {elapsed_s:.0f} s"
    )
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < 0.05 * weight_bytes
