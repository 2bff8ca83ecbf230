"""The engine's own step, of an 8B model, compiled ahead of time for chips that are not here."""

import os
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.models.decoder import Decoder
from jinfer.resolve import resolve_plan
from jinfer.startup import step_programs
from jinfer.step.kv_cache import pages_shape
from jinfer.step.slots import empty_slots
from kernels_pallas.compat import told_the_chip

pytestmark = pytest.mark.slow
pytest.importorskip("libtpu", reason='the TPU compiler is not here; pip install "jax[tpu]"')

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


def shapes_of(plan: EnginePlan) -> tuple[Any, Any, Any]:
    """Parameters, pool and slots of the 8B model under a plan, as shapes."""
    decoder = Decoder(LLAMA_3_8B)
    layers = LLAMA_3_8B.num_layers

    def of_dtype(shape: jax.ShapeDtypeStruct, *leading: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *shape.shape), plan.dtype)

    params = {name: of_dtype(shape) for name, shape in decoder.ends_shapes.items()}
    params["blocks"] = {n: of_dtype(s, layers) for n, s in decoder.block_shapes.items()}
    pages = pages_shape(
        LLAMA_3_8B, num_pages=plan.num_pages, page_size=plan.page_size, dtype=plan.dtype
    )
    slots = jax.eval_shape(
        lambda: empty_slots(
            max_slots=plan.max_slots,
            pages_per_slot=plan.pages_per_slot,
            vocab_size=LLAMA_3_8B.vocab_size,
        )
    )
    return params, pages, slots


@pytest.mark.parametrize("num_tokens", [16, 512])
def test_8b_step_on_v6e_copies_neither_weights_nor_pool(num_tokens: int) -> None:
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
    config = EngineConfig(model="-", max_num_seqs=16, max_num_batched_tokens=512)
    plan = resolve_plan(config, LLAMA_3_8B, platform="tpu", free_bytes=12 << 30)
    assert plan.attention == "tpu" and plan.layer_loop == "scan"
    params, pages, slots = shapes_of(plan)
    [program] = [
        p
        for p in step_programs(plan, LLAMA_3_8B, params, pages, slots)
        if p.name == f"step of {num_tokens} tokens"
    ]
    sharding = jax.sharding.SingleDeviceSharding(chip)
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), program.shapes
    )
    with told_the_chip(chip):
        lowered = jax.jit(program.function, donate_argnums=program.donate).lower(*placed)
    memory = lowered.compile().memory_analysis()
    pool_bytes = plan.num_pages * plan.page_bytes
    weight_bytes = 2 * LLAMA_3_8B.num_parameters
    print(f"{num_tokens=} temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB")
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < 0.05 * weight_bytes
