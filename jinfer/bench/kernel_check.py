"""Checks the kernels that `jinfer bench kernels` times against a dense softmax, per token."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.cases import Case
from kernels_pallas.paged_attention.pages import Pages, cells_of, new_cells, scales_of

# Fractions of the largest output. float32: 1e-5 in the tests, with ordinary queries; here scores
# and their errors are QUERY_FACTOR times as large.
BOUNDS = {"float32": 8e-5, "bfloat16": 2e-2, "float16": 5e-3}
# Tokens of a case that are checked, spread from the first to the last.
_NUM_TOKENS = 64
# Larger queries than in the timing: few keys then have weight, so a missed key shows.
QUERY_FACTOR = 8


class Step(NamedTuple):
    """The arrays of one call, and the place of its tokens."""

    q_TNH: Array
    new_TKH: Array  # new keys, and values too
    table_BM: np.ndarray
    kv_len_B: np.ndarray
    start_B: np.ndarray
    query_len_B: np.ndarray


def max_error(
    attend: Callable[..., tuple[Any, Any]],
    case: Case,
    step: Step,
    make_pages: Callable[[], Pages],
    split: Callable[[Pages], Any] | None,
) -> float:
    """The largest error of any checked output, as a fraction of the largest output.

    Args:
      attend: `attend(q_TNH, k_TKH, v_TKH, pages, layer, table_BM, *rows)`, without a scale.
      case: the shapes.
      step: the case's arrays.
      make_pages: makes a pool of one layer, the same on each call; only one exists at a time.
      split: for baselines, which attend to pages of another form and do not write: makes those
        pages from a pool that already has the new keys and values.
    """
    scale = case.head_dim**-0.5
    step = step._replace(q_TNH=step.q_TNH * QUERY_FACTOR)
    row_T = np.repeat(np.arange(len(step.kv_len_B)), step.query_len_B)
    position_T = np.arange(len(row_T)) - (step.start_B - step.kv_len_B + step.query_len_B)[row_T]
    write = jax.jit(_write, donate_argnums=0)
    pages = write(make_pages(), step.new_TKH, step.table_BM, row_T, position_T)
    chosen = np.unique(np.linspace(0, len(row_T) - 1, _NUM_TOKENS).astype(np.int32))
    page_table = step.table_BM[row_T[chosen]]
    answer = jax.jit(partial(_answers, scale=scale))
    want = np.asarray(answer(step.q_TNH[chosen], pages, page_table, position_T[chosen] + 1))
    if split is None:
        del pages
        pages = make_pages()
    else:
        pages = jax.jit(split)(pages)
    rows = (step.table_BM, step.kv_len_B, step.start_B, step.query_len_B)
    run = jax.jit(partial(attend, scale=scale), donate_argnums=3)
    out_TNH, _ = run(step.q_TNH, step.new_TKH, step.new_TKH, pages, jnp.int32(0), *rows)
    got = np.asarray(out_TNH)[chosen].astype(np.float32)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def _write(
    pages: Pages,
    new_TKH: Float[Array, "T K H"],
    table_BM: Int32[Array, "B M"],
    row_T: Int32[Array, "T"],
    position_T: Int32[Array, "T"],
) -> Pages:
    page_size = cells_of(pages).shape[3]
    page_T, offset_T = table_BM[row_T, position_T // page_size], position_T % page_size
    cells_TK2H, scales_TK2 = new_cells(new_TKH, new_TKH, pages)
    cells = cells_of(pages).at[0, page_T, :, offset_T].set(cells_TK2H)
    if scales_TK2 is None:
        return cells
    scales = scales_of(pages)
    assert scales is not None, "cells came with scales"
    return type(pages)(cells, scales.at[0, page_T, :, :, offset_T].set(scales_TK2))


def _answers(
    q_TNH: Float[Array, "T N H"],
    pages: Pages,
    table_TM: Int32[Array, "T M"],
    visible_T: Int32[Array, "T"],
    *,
    scale: float,
) -> Float[Array, "T N H"]:
    """softmax(scale * q k) v in float32, one token at a time, over its whole page table."""
    cells, scales = cells_of(pages), scales_of(pages)
    num_kv_heads = cells.shape[2]

    def answer(token: tuple[Array, Array, Array]) -> Array:
        q_NH, page_ids, visible = token
        cells_MKZ2H = cells[0, page_ids].astype(jnp.float32)
        if scales is not None:
            scales_MKZ2 = jnp.moveaxis(scales[0, page_ids], 2, 3)
            cells_MKZ2H *= jnp.repeat(scales_MKZ2, cells.shape[4] // 2, axis=-1)
        kv_KS2H = jnp.moveaxis(cells_MKZ2H, 1, 0).reshape(num_kv_heads, -1, cells.shape[4])
        key_KSH, value_KSH = jnp.split(kv_KS2H, 2, axis=-1)
        q_KGH = q_NH.astype(jnp.float32).reshape(num_kv_heads, -1, q_NH.shape[1])
        einsum = partial(jnp.einsum, precision="highest")
        score_KGS = einsum("KGH,KSH->KGS", q_KGH, key_KSH) * scale
        score_KGS = jnp.where(jnp.arange(key_KSH.shape[1]) < visible, score_KGS, -jnp.inf)
        return einsum("KGS,KSH->KGH", jax.nn.softmax(score_KGS), value_KSH).reshape(q_NH.shape)

    return lax.map(answer, (q_TNH, table_TM, visible_T))
