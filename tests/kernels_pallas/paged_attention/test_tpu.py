"""paged_attention_tpu: its numbers in interpret mode, its work lists, and its manners."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.paged_attention.cases import CASES, LAYER, Case, build
from kernels_pallas.paged_attention.reference import paged_attention_reference
from kernels_pallas.paged_attention.tpu import paged_attention_tpu
from kernels_pallas.paged_attention.tpu_work import Rows, attend_items, write_items

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# Small enough that every case has several items, shared blocks of queries, blocks of pages.
SMALL = {"tile_tokens": 4, "block_tokens": 16}
# Each takes seconds to interpret. These have both passes, every option, and both dtypes.
FAST = (("window_soft_cap_sinks", "eager"), ("bfloat16_sinks", "on_wait"))
REFUSED = ("float16", "width_96")  # see test_refuses_what_it_cannot_do
# A copy that nobody waited for shows up in one of these modes or the other: "eager" copies at
# once, over what is still being read; "on_wait" not before somebody waits.
MODES = ("eager", "on_wait")
MANY_PAGES = Case(name="table_of_two_lines", kv_len=(20, 9), query_len=(5, 1), spare_pages=200)


RUNS = [
    pytest.param(
        case,
        mode,
        id=f"{case.name}-{mode}",
        marks=() if (case.name, mode) in FAST else pytest.mark.slow,
    )
    for case in (*CASES, MANY_PAGES)
    for mode in MODES
    if case.name not in REFUSED
]


def interpreted(inputs, mode, **tiling):
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
    fn = partial(paged_attention_tpu, **inputs.options, **tiling, interpret=interpret)
    return jax.jit(fn, static_argnums=4)


def same_bits(a, b):
    return np.array_equal(*(np.ascontiguousarray(x).view(np.uint8) for x in (a, b)))


def same_pages(a, b):
    """Page 0 is the bin; everything else is bit-exact: written where asked, else untouched."""
    return all(
        same_bits(x[:, 1:], y[:, 1:]) and same_bits(np.delete(x, LAYER, 0), np.delete(y, LAYER, 0))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_equals_the_reference(case, mode, capfd):
    check(case, mode, SMALL)
    assert not complaints(capfd)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill_and_decode", "verify_5_tokens", "big_pages"])
def test_equals_the_reference_with_default_tiles(name, capfd):
    check(next(case for case in CASES if case.name == name), "eager", {})
    assert not complaints(capfd)


def complaints(capfd):
    """What interpret mode found: races, and semaphores that a kernel left signalled.

    It prints them, and forgets those of one kernel when the next one starts.
    """
    return [line for line in capfd.readouterr().out.splitlines() if line[:4] in ("RACE", "Sema")]


def check(case, mode, tiling):
    inputs = build(case)
    expected_TNH, expected_pages = paged_attention_reference(*inputs.args, **inputs.options)
    attend = interpreted(inputs, mode, **tiling)
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


def test_a_planted_race_is_complained_about(capfd):
    def hasty_kernel(source_ref, out_ref, buffer_ref, sem):
        pltpu.make_async_copy(source_ref, buffer_ref, sem).start()
        out_ref[...] = buffer_ref[...]

    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    source = jnp.ones((8, 128))
    copied = pl.pallas_call(
        hasty_kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(source.shape, source.dtype),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=interpret,
    )(source)
    copied.block_until_ready()
    assert [line[:4] for line in complaints(capfd)] == ["RACE", "Sema"]


@pytest.mark.slow
def test_a_row_is_bit_equal_whatever_the_others_do():
    case = next(case for case in CASES if case.name == "prefill_and_decode")
    inputs = build(case)
    *arrays, page_table_BM, kv_len_B, start_B, query_len_B = inputs.args
    attend = interpreted(inputs, "eager", **SMALL)
    together_TNH, _ = attend(*inputs.args)
    for row, count in enumerate(case.query_len):
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


NUM_ROWS, NUM_TOKENS = 6, 96


def random_rows(rng):
    """Rows of any lengths, empty ones among them, packed in any order with gaps."""
    query_len_B = rng.choice([0, 1, 1, 5, 8, 17], NUM_ROWS)
    kv_len_B = query_len_B + rng.integers(0, 40, NUM_ROWS)
    start_B, token = np.zeros(NUM_ROWS, int), 0
    for row in rng.permutation(NUM_ROWS):
        token += int(rng.integers(0, 3))
        start_B[row], token = token, token + query_len_B[row]
    assert token <= NUM_TOKENS
    return Rows(*(jnp.asarray(a, jnp.int32) for a in (kv_len_B, start_B, query_len_B)))


@cache
def jitted(fn, *static_argnums):
    return jax.jit(fn, static_argnums=static_argnums)


def new_tokens(rows):
    """(row, token, position) of every new token."""
    for row, (kv_len, start, count) in enumerate(zip(*map(np.asarray, rows), strict=True)):
        yield from ((row, start + i, kv_len - count + i) for i in range(count))


@pytest.mark.parametrize("tile_tokens", [1, 4, 8])
@pytest.mark.parametrize("seed", range(8))
def test_attend_items_cover_every_query_once_in_ascending_blocks(seed, tile_tokens):
    rows = random_rows(np.random.default_rng(seed))
    items, num_used = jitted(attend_items, 1, 2)(rows, tile_tokens, NUM_TOKENS)
    items = type(items)(*map(np.asarray, items))
    assert int(num_used) <= len(items.row_X)
    covered = [
        (row, block * tile_tokens + first + i, position + i)
        for block, row, first, count, position in zip(*items, strict=True)
        for i in range(count)
    ]
    assert sorted(covered) == sorted(new_tokens(rows))
    used = slice(int(num_used))
    assert (items.count_X[used] > 0).all() and not items.count_X[int(num_used) :].any()
    assert (np.diff(items.block_X[used]) >= 0).all()
    assert (items.first_X + items.count_X <= tile_tokens)[used].all()


@pytest.mark.parametrize(("page_size", "slab"), [(16, 16), (32, 8), (24, 24)])
@pytest.mark.parametrize("seed", range(8))
def test_write_items_cover_every_cell_once_and_no_slab_twice(seed, page_size, slab):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng)
    table_BM = 1 + rng.permutation(NUM_ROWS * 8).reshape(NUM_ROWS, 8).astype(np.int32)
    items, num_used = jitted(write_items, 2, 3, 4)(rows, table_BM, page_size, slab, NUM_TOKENS)
    items = type(items)(*map(np.asarray, items))
    written = [
        (token + i, page * page_size + slab_index * slab + first + i)
        for page, slab_index, first, count, token in zip(*items, strict=True)
        for i in range(count)
    ]
    expected = [
        (token, table_BM[row, position // page_size] * page_size + position % page_size)
        for row, token, position in new_tokens(rows)
    ]
    assert sorted(written) == sorted(expected)
    slabs = list(zip(items.page_X, items.slab_X, strict=True))[: int(num_used)]
    assert len(set(slabs)) == len(slabs)
    # Unused items point at the bin, so that the one that runs when none is used harms nobody.
    assert not items.page_X[int(num_used) :].any() and not items.slab_X[int(num_used) :].any()


def one_row(dtype="float32", head_dim=64, page_size=8, **tiling):
    shape = {"dtype": dtype, "head_dim": head_dim, "page_size": page_size}
    inputs = build(Case(name="one_row", kv_len=(9,), query_len=(4,), **shape))
    return lambda: paged_attention_tpu(*inputs.args, **inputs.options, **tiling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "on TPU, pages must be float32 or .*; got dtype=float16. Convert"),
        ({"page_size": 12}, "a page holds a multiple of 8 tokens; got page_size=12. Choose"),
        ({"head_dim": 96}, "a multiple of 64; got head_dim=96. Allocate it with 128, or"),
    ],
)
def test_refuses_what_it_cannot_do(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        one_row(**changes)()


def test_refuses_a_tile_of_nothing():
    with pytest.raises(ValueError, match=r"must be >= 1; got tile_tokens=0, .*Leave them out"):
        one_row(tile_tokens=0)()
