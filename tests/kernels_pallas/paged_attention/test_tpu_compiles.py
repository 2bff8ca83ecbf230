"""paged_attention_tpu compiled ahead of time for real chips, none of which is needed.

The compiler comes with libtpu (`pip install "jax[tpu]"`); without it these are skipped.
What is read off a program: the pool is aliased whole, and nothing of its size is temporary.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from kernels_pallas.compat import told_the_chip
from kernels_pallas.paged_attention.tpu import paged_attention_tpu

pytestmark = pytest.mark.slow
pytest.importorskip("libtpu", reason='the TPU compiler is not here; pip install "jax[tpu]"')

TARGETS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
NUM_LAYERS, NUM_CELLS = 4, 65536


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache():
    """A program compiled without its device is written to the cache, but cannot be read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which asks whether it is enabled only once
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(params=TARGETS)
def chip(request):
    return describe(request.param)


def describe(target):
    # Else the compiler asks the cloud what machine this is, and locks it for one process.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    return topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]


def memory_of(
    chip,
    *,
    num_tokens=64,
    num_rows=16,
    table_width=64,
    num_kv_heads=2,
    group=4,
    head_width=128,
    page_size=64,
    dtype="bfloat16",
    sinks=False,
    scanned=False,
    **options,
):
    """Compiles one call, or one per layer in a scan, and returns (memory, pool's bytes)."""
    num_q_heads = num_kv_heads * group
    sharding = jax.sharding.SingleDeviceSharding(chip)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def one(pages, q_TNH, k_TKH, v_TKH, sinks_N, layer, rows):
        return paged_attention_tpu(
            *(q_TNH, k_TKH, v_TKH, pages, layer, *rows),
            scale=head_width**-0.5,
            sinks_N=sinks_N if sinks else None,
            **options,
        )

    def all_layers(pages, q_TNH, k_TKH, v_TKH, sinks_N, layer, rows):
        def body(carry, layer):
            q_TNH, pages = carry
            out_TNH, pages = one(pages, q_TNH, k_TKH, v_TKH, sinks_N, layer, rows)
            return (q_TNH + out_TNH, pages), None

        return lax.scan(body, (q_TNH, pages), jnp.arange(NUM_LAYERS, dtype=jnp.int32))[0]

    per_row = shaped((num_rows,), jnp.int32)
    num_pages = NUM_CELLS // page_size
    pages = shaped((NUM_LAYERS, num_pages, num_kv_heads, page_size, 2 * head_width), dtype)
    kv_TKH = shaped((num_tokens, num_kv_heads, head_width), dtype)
    args = (
        pages,
        shaped((num_tokens, num_q_heads, head_width), dtype),
        *(kv_TKH, kv_TKH),
        shaped((num_q_heads,), jnp.float32),
        shaped((), jnp.int32),
        (shaped((num_rows, table_width), jnp.int32), per_row, per_row, per_row),
    )
    with told_the_chip(chip):
        program = jax.jit(all_layers if scanned else one, donate_argnums=0).lower(*args).compile()
    return program.memory_analysis(), int(np.prod(pages.shape)) * pages.dtype.itemsize


def check(chip, **shape):
    memory, pool_bytes = memory_of(chip, **shape)
    assert memory.alias_size_in_bytes >= pool_bytes
    # Queries and outputs laid out for the kernel, and plans; not a layer of the pool.
    assert memory.temp_size_in_bytes < pool_bytes // NUM_LAYERS // 2


SHAPES = {
    "llama_8b": {"num_kv_heads": 8},
    "width_64_group_16": {"num_kv_heads": 1, "group": 16, "head_width": 64, "page_size": 16},
    "width_256": {"group": 8, "head_width": 256, "page_size": 128},
    "all_options": {"window": 100, "soft_cap": 30.0, "sinks": True},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compiles_for_every_chip(chip, shape):
    check(chip, **shape)


V5E_SHAPES = {
    "one_token": {"num_tokens": 1, "num_rows": 1},
    "decode_only": {"num_tokens": 16, "tile_tokens": 1},
    "full_step": {"num_tokens": 2048, "num_rows": 256, "num_kv_heads": 8, "page_size": 16},
    "table_past_scalar_memory": {"num_rows": 64, "table_width": 8192, "page_size": 16},
    "group_1": {"num_kv_heads": 8, "group": 1},
    "group_3": {"num_kv_heads": 4, "group": 3, "head_width": 64},
    "group_16_of_8_heads": {"num_kv_heads": 8, "group": 16},
    "no_grouping_32_heads": {"num_kv_heads": 32, "group": 1},
    "width_256_of_8_heads": {"num_kv_heads": 8, "head_width": 256},
    "float32": {"num_kv_heads": 8, "page_size": 16, "dtype": "float32"},
    "float32_width_256": {"head_width": 256, "dtype": "float32"},
}


@pytest.mark.parametrize("shape", V5E_SHAPES.values(), ids=V5E_SHAPES)
def test_compiles_for_the_chip_with_the_least_memory(shape):
    check(describe("v5e:2x2"), **shape)


def test_a_scan_over_layers_copies_nothing(chip):
    check(chip, num_kv_heads=8, page_size=16, scanned=True)
