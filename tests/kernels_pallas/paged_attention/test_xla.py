"""paged_attention_xla against the reference, its memory, and its manners."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kernels_pallas.paged_attention.cases import CASES, LAYER, Case, build
from kernels_pallas.paged_attention.pages import QuantizedPages
from kernels_pallas.paged_attention.reference import paged_attention_reference
from kernels_pallas.paged_attention.xla import paged_attention_xla

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
# Small enough that every case has several tiles, blocks and groups of tiles.
SMALL = {"tile_tokens": 4, "tiles_at_once": 3, "block_tokens": 16}
# The default tiles are wider than most cases, so a few are enough to try them on.
WITH_DEFAULT_TILES = (
    "one_token",
    "all_pages",
    "empty_rows",
    "prefill_and_decode",
    "group_3",
    "window_soft_cap_sinks",
    "bfloat16",
)


def compiled(inputs, **tiling):
    fn = partial(paged_attention_xla, **inputs.options, **tiling)
    return jax.jit(fn, static_argnums=4)


def same_bits(a, b):
    return np.array_equal(*(np.ascontiguousarray(x).view(np.uint8) for x in (a, b)))


def same_pages(a, b):
    """Page 0 is the bin; everything else is bit-exact: written where asked, else untouched."""
    return all(
        same_bits(x[:, 1:], y[:, 1:]) and same_bits(np.delete(x, LAYER, 0), np.delete(y, LAYER, 0))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_reference_on_every_case(case):
    check(case, SMALL)


@pytest.mark.parametrize("name", WITH_DEFAULT_TILES)
def test_equals_the_reference_with_default_tiles(name):
    check(next(case for case in CASES if case.name == name), {})


@pytest.mark.parametrize("query_len", [1, 40])
def test_float16_loses_no_small_weight_of_a_small_value(query_len):
    case = Case(
        name="long_flat_tail",
        kv_len=(400,),
        query_len=(query_len,),
        dtype="float16",
        pages_dtype="int8",
        page_size=16,
    )
    inputs = build(case)
    q_TNH, k_TKH, v_TKH, pages, *where = inputs.args
    # Beside a sink of exp(8) every weight is small, and every value is near 1e-3.
    options = inputs.options | {"sinks_N": jnp.full(case.num_q_heads, 8.0)}
    cells, scales = pages
    pages = QuantizedPages(cells, scales.at[:, :, :, 1].multiply(1e-3))
    args = (q_TNH * 0.01, k_TKH, v_TKH * 1e-3, pages, *where)
    expected_TNH, _ = paged_attention_reference(*args, **options)
    out_TNH, _ = jax.jit(partial(paged_attention_xla, **options), static_argnums=4)(*args)
    want = expected_TNH[inputs.owned_T]
    got = np.asarray(out_TNH, np.float32)[inputs.owned_T]
    assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


def check(case, tiling):
    inputs = build(case)
    expected_TNH, expected_pages = paged_attention_reference(*inputs.args, **inputs.options)
    attend = compiled(inputs, **tiling)
    out_TNH, pages = jax.tree.map(np.asarray, attend(*inputs.args))

    tolerance = TOLERANCE[case.dtype]
    owned_T = inputs.owned_T
    np.testing.assert_allclose(
        out_TNH[owned_T].astype(np.float32), expected_TNH[owned_T], rtol=tolerance, atol=tolerance
    )
    np.testing.assert_array_equal(out_TNH[~owned_T], 0)
    assert out_TNH.dtype == inputs.args[0].dtype
    assert same_pages(pages, expected_pages)

    again_TNH, pages_again = jax.tree.map(np.asarray, attend(*inputs.args))
    assert same_bits(out_TNH, again_TNH)
    assert all(map(same_bits, jax.tree.leaves(pages), jax.tree.leaves(pages_again)))


MIXED = next(case for case in CASES if case.name == "prefill_and_decode")


@pytest.mark.parametrize("tiling", [{}, SMALL], ids=["default_tiles", "small_tiles"])
def test_a_row_is_bit_equal_whatever_the_others_do(tiling):
    inputs = build(MIXED)
    *arrays, page_table_BM, kv_len_B, start_B, query_len_B = inputs.args
    attend = compiled(inputs, **tiling)
    together_TNH, _ = attend(*inputs.args)
    for row, count in enumerate(MIXED.query_len):
        only_this_B = jnp.arange(len(kv_len_B)) == row
        alone_TNH, _ = attend(
            *arrays,
            jnp.where(only_this_B[:, None], page_table_BM, 0),
            jnp.where(only_this_B, kv_len_B, 0),
            start_B,
            jnp.where(only_this_B, query_len_B, 0),
        )
        mine = slice(int(start_B[row]), int(start_B[row]) + count)
        np.testing.assert_array_equal(alone_TNH[mine], together_TNH[mine])


@pytest.mark.smoke
def test_a_traced_layer_equals_a_python_one():
    inputs = build(MIXED)
    fn = partial(paged_attention_xla, **inputs.options)
    out_TNH, pages = jax.jit(fn, static_argnums=4)(*inputs.args)
    args = [*inputs.args[:4], jnp.int32(LAYER), *inputs.args[5:]]
    traced_TNH, traced_pages = jax.jit(fn)(*args)
    np.testing.assert_array_equal(out_TNH, traced_TNH)
    np.testing.assert_array_equal(pages, traced_pages)


NUM_LAYERS = 4


def _block(hidden_TNH, pages, layer, rows):
    """As a decoder does it: each layer's queries, keys and values come from the one before."""
    kv_TKH = hidden_TNH[:, :2] * 0.5
    out_TNH, pages = paged_attention_xla(
        hidden_TNH, kv_TKH, kv_TKH + 1, pages, layer, *rows, scale=0.125
    )
    return hidden_TNH + out_TNH, pages


def _unrolled(hidden_TNH, pages, rows):
    for layer in range(NUM_LAYERS):
        hidden_TNH, pages = _block(hidden_TNH, pages, layer, rows)
    return hidden_TNH, pages


def _scanned(hidden_TNH, pages, rows):
    def body(carry, layer):
        return _block(*carry, layer, rows), None

    return lax.scan(body, (hidden_TNH, pages), jnp.arange(NUM_LAYERS, dtype=jnp.int32))[0]


def _looped(hidden_TNH, pages, rows, *, layers):
    table_BM, kv_len_B, start_B, query_len_B = rows

    def step(i, carry):
        return layers(*carry, (table_BM, kv_len_B + i, start_B, query_len_B))

    # Not a constant number of steps: that would become a scan and could be unrolled.
    return lax.fori_loop(0, kv_len_B[0], step, (hidden_TNH, pages))


@pytest.mark.parametrize("num_tokens", [1, 48])
@pytest.mark.parametrize(
    "program",
    [
        _unrolled,
        _scanned,
        partial(_looped, layers=_unrolled),
        partial(_looped, layers=_scanned),
    ],
    ids=["unrolled", "scanned", "steps_of_unrolled", "steps_of_scanned"],
)
def test_a_donated_pool_is_updated_in_place(program, num_tokens):
    num_rows = 1 if num_tokens == 1 else 8
    pages = jax.ShapeDtypeStruct((NUM_LAYERS, 512, 2, 16, 128), jnp.float32)
    hidden_TNH = jax.ShapeDtypeStruct((num_tokens, 4, 64), jnp.float32)
    per_row = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    table_BM = jax.ShapeDtypeStruct((num_rows, 256), jnp.int32)
    rows = (table_BM, per_row, per_row, per_row)
    memory = (
        jax.jit(program, donate_argnums=1)
        .lower(hidden_TNH, pages, rows)
        .compile()
        .memory_analysis()
    )
    pool_bytes = 4 * int(np.prod(pages.shape))
    assert memory.alias_size_in_bytes >= pool_bytes
    # Not a layer of the pool either, nor a score for every token and position.
    assert memory.temp_size_in_bytes < pool_bytes // NUM_LAYERS // 2


def one_row(**changes):
    inputs = build(Case(name="one_row", kv_len=(9,), query_len=(4,), num_padding=0))
    names = ("q", "k", "v", "pages", "layer", "page_table", "kv_len", "query_start", "query_len")
    args = dict(zip(names, inputs.args, strict=True))
    options = {**inputs.options}
    for name, value in changes.items():
        (args if name in args else options)[name] = value
    return lambda: paged_attention_xla(*args.values(), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((4, 256))}, r"q must be \[T, N, H\], k and v both \[T, K, H\]; got q_TNH"),
        ({"v": jnp.zeros((4, 1, 64))}, r"v_TKH.shape=\(4, 1, 64\). Pack the new tokens that way"),
        ({"q": jnp.zeros((5, 4, 64))}, r"same number of tokens and head_dim; .*\(5, 4, 64\)"),
        ({"q": jnp.zeros((4, 3, 64))}, r"multiple of the kv heads; got N=3, K=2. Repeat"),
        ({"pages": jnp.zeros((1, 9, 8, 2, 128))}, r"pages are \[L, P, K=2, Z, 2H=128\]; got shape"),
        ({"pages": jnp.zeros((9, 2, 8, 128))}, r"got shape \(9, 2, 8, 128\). Allocate the pool"),
        ({"page_table": jnp.zeros((4,), jnp.int32)}, r"page table is \[B, M\]; got .*\(4,\)"),
        ({"kv_len": jnp.ones((2,), jnp.int32)}, r"kv_len_B needs one number .*B=1; got shape \(2,"),
        ({"query_len": jnp.ones((1,))}, r"query_len_B must be int32; got dtype=float32. Convert"),
        ({"sinks_N": jnp.zeros((2,))}, r"one logit per query head, N=4; got shape \(2,\). Pass"),
        ({"window": 0}, r"window must be >= 1 token; got window=0. Pass None"),
        ({"soft_cap": 0.0}, r"soft_cap must be > 0; got soft_cap=0.0. Pass None"),
        ({"block_tokens": 0}, r"tile sizes must be >= 1; .*block_tokens=0. Leave them out"),
    ],
)
def test_refuses_arguments_that_disagree(changes, message):
    with pytest.raises(ValueError, match=message):
        one_row(**changes)()


def test_refuses_a_pool_it_cannot_read():
    pages = jnp.zeros((3, 9, 2, 8, 128), jnp.int8)
    with pytest.raises(NotImplementedError, match="pages hold float32.*got dtype=int8. Allocate"):
        one_row(pages=pages)()
