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
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from kernels_pallas.compat import told_the_chip
from kernels_pallas.paged_attention.pages import QuantizedPages
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
    return chips_of(target)[0]


def chips_of(target):
    # Else the compiler asks the cloud what machine this is, and locks it for one process.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    return topologies.get_topology_desc(platform="tpu", topology_name=target).devices


def memory_of(  # noqa: PLR0913 - one for each thing that a shape may change
    chip,
    *,
    num_tokens=64,
    num_rows=16,
    table_width=64,
    num_kv_heads=2,
    group=4,
    head_dim=128,
    page_size=64,
    num_cells=NUM_CELLS,
    dtype="bfloat16",
    pages_dtype=None,
    stored_width=None,
    sinks=False,
    looped=False,
    **options,
):
    """Compiles one call, or one per layer and step, and returns (memory, the pool's bytes)."""
    num_q_heads = num_kv_heads * group
    sharding = jax.sharding.SingleDeviceSharding(chip)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def one(pages, q_TNH, k_TKH, v_TKH, sinks_N, layer, rows):
        return paged_attention_tpu(
            *(q_TNH, k_TKH, v_TKH, pages, layer, *rows),
            scale=head_dim**-0.5,
            sinks_N=sinks_N if sinks else None,
            **options,
        )

    per_row = shaped((num_rows,), jnp.int32)
    num_pages = num_cells // page_size
    per_head = (NUM_LAYERS, num_pages, num_kv_heads)
    width = 2 * (stored_width or head_dim)
    pages = shaped((*per_head, page_size, width), pages_dtype or dtype)
    if pages_dtype is not None:
        pages = QuantizedPages(pages, shaped((*per_head, 2, page_size), jnp.float32))
    kv_TKH = shaped((num_tokens, num_kv_heads, head_dim), dtype)
    args = (
        pages,
        shaped((num_tokens, num_q_heads, head_dim), dtype),
        *(kv_TKH, kv_TKH),
        shaped((num_q_heads,), jnp.float32),
        shaped((), jnp.int32),
        (shaped((num_rows, table_width), jnp.int32), per_row, per_row, per_row),
    )
    with told_the_chip(chip):
        program = jax.jit(in_loops(one) if looped else one, donate_argnums=0).lower(*args).compile()
    pool_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
    return program.memory_analysis(), pool_bytes


def in_loops(one):
    """As a decoder does it: steps in a loop, layers in a scan, the pool carried by both."""

    def all_layers(pages, q_TNH, k_TKH, v_TKH, sinks_N, rows):
        def body(carry, layer):
            q_TNH, pages = carry
            out_TNH, pages = one(pages, q_TNH, k_TKH, v_TKH, sinks_N, layer, rows)
            return (q_TNH + out_TNH, pages), None

        return lax.scan(body, (q_TNH, pages), jnp.arange(NUM_LAYERS, dtype=jnp.int32))[0]

    def steps(pages, q_TNH, k_TKH, v_TKH, sinks_N, num_steps, rows):
        def step(i, carry):
            table_BM, kv_len_B, *rest = rows
            q_TNH, pages = carry
            return all_layers(pages, q_TNH, k_TKH, v_TKH, sinks_N, (table_BM, kv_len_B + i, *rest))

        return lax.fori_loop(0, num_steps, step, (q_TNH, pages))

    return steps


def check(chip, **shape):
    memory, pool_bytes = memory_of(chip, **shape)
    assert memory.alias_size_in_bytes >= pool_bytes
    # Queries and outputs laid out for the kernel, and plans; not a layer of the pool.
    assert memory.temp_size_in_bytes < pool_bytes // NUM_LAYERS // 2


SHAPES = {
    "llama_8b": {"num_kv_heads": 8},
    "width_64_group_16": {"num_kv_heads": 1, "group": 16, "head_dim": 64, "page_size": 16},
    "width_256": {"group": 8, "head_dim": 256, "page_size": 128},
    "all_options": {"window": 100, "soft_cap": 30.0, "sinks": True},
    "int8_pages": {"num_kv_heads": 8, "pages_dtype": "int8", "page_size": 128},
    "fp8_pages": {"num_kv_heads": 8, "pages_dtype": "float8_e4m3fn", "page_size": 128},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compiles_for_every_chip(chip, shape):
    check(chip, **shape)


V5E_SHAPES = {
    "one_token": {"num_tokens": 1, "num_rows": 1},
    "decode_only": {"num_tokens": 16, "tile_tokens": 1},
    "full_step": {"num_tokens": 2048, "num_rows": 256, "num_kv_heads": 8, "page_size": 16},
    "table_past_scalar_memory": {"num_rows": 64, "table_width": 8192, "page_size": 16},
    "bfloat16_page_of_8": {"page_size": 8},
    "group_1": {"num_kv_heads": 8, "group": 1},
    "group_3": {"num_kv_heads": 4, "group": 3, "head_dim": 64},
    "group_16_of_8_heads": {"num_kv_heads": 8, "group": 16},
    "no_grouping_32_heads": {"num_kv_heads": 32, "group": 1},
    "width_256_of_8_heads": {"num_kv_heads": 8, "head_dim": 256},
    "float32": {"num_kv_heads": 8, "page_size": 16, "dtype": "float32"},
    "float32_width_256": {"head_dim": 256, "dtype": "float32"},
    "width_96_stored_as_128": {"head_dim": 96, "stored_width": 128},
    "int8_pages_of_32": {"pages_dtype": "int8", "page_size": 32},
    "int8_pages_of_64_width_64": {"pages_dtype": "int8", "head_dim": 64},
    "fp8_pages_of_64_width_256": {"pages_dtype": "float8_e4m3fn", "head_dim": 256},
    "int8_full_step": {
        "num_tokens": 2048,
        "num_rows": 256,
        "num_kv_heads": 8,
        "pages_dtype": "int8",
    },
}


@pytest.mark.parametrize("shape", V5E_SHAPES.values(), ids=V5E_SHAPES)
def test_compiles_for_the_chip_with_the_least_memory(shape):
    check(describe("v5e:2x2"), **shape)


@pytest.mark.parametrize("pages_dtype", [None, "int8"])
def test_a_loop_of_steps_over_scanned_layers_copies_nothing(chip, pages_dtype):
    check(chip, num_kv_heads=8, page_size=64, pages_dtype=pages_dtype, looped=True)


@pytest.mark.parametrize("target", ["v5e:2x2", "tpu7x:2x2x1"])
def test_shards_along_kv_heads_without_a_collective(target):
    chips = np.array(chips_of(target)).reshape(1, -1)
    mesh = jax.sharding.Mesh(chips, ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    pool, heads, rest = Spec(None, None, "tensor"), Spec(None, "tensor"), Spec()

    def shaped(shape, spec, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def sharded(pages, q_TNH, k_TKH, v_TKH, *rest_of_step):
        attend = jax.shard_map(
            lambda *args: paged_attention_tpu(*args, scale=0.1),
            in_specs=(heads, heads, heads, pool, *[rest] * 5),
            out_specs=(heads, pool),
            check_vma=False,
        )
        return attend(q_TNH, k_TKH, v_TKH, pages, *rest_of_step)

    pages = shaped((NUM_LAYERS, 1024, 8, 64, 256), pool, jnp.bfloat16)
    kv_TKH = shaped((64, 8, 128), heads, jnp.bfloat16)
    step = (shaped((), rest), shaped((16, 64), rest), *[shaped((16,), rest)] * 3)
    q_TNH = shaped((64, 32, 128), heads, jnp.bfloat16)
    with jax.set_mesh(mesh):
        program = jax.jit(sharded, donate_argnums=0).lower(pages, q_TNH, kv_TKH, kv_TKH, *step)
        program = program.compile()
    share_bytes = int(np.prod(pages.shape)) * 2 // chips.size
    assert program.memory_analysis().alias_size_in_bytes >= share_bytes
    assert program.memory_analysis().temp_size_in_bytes < share_bytes // NUM_LAYERS // 2
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program.as_text()


@pytest.mark.parametrize("target", ["v5e:2x2", "v6e:2x2"])
def test_scales_of_8_bit_pages_are_copied_unless_they_fill_rows_of_128(target):
    """Why the engine refuses small ones: the copies are no temporaries, yet memory at the peak."""
    extra = {}
    for page_size in (64, 128):
        memory, pool_bytes = memory_of(
            describe(target),
            pages_dtype="int8",
            page_size=page_size,
            num_kv_heads=8,
            num_cells=1 << 18,  # a small pool's scales go to VMEM whole
        )
        extra[page_size] = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    scale_bytes = pool_bytes * 4 // (128 + 4)
    assert extra[64] > 2 * scale_bytes and extra[128] < scale_bytes // 4, (extra, scale_bytes)
