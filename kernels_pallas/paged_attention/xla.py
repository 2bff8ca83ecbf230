"""Paged attention in plain XLA: runs anywhere; CPUs and older GPUs use it.

Beside the usual axis letters (T N K G H L P Z B M), in this file:
X  tiles in the work list            Y  tiles computed together
U  query tokens in a tile            Q  query rows of one kv head in a tile, U * G
C  pages in a block                  S  key positions in a block, C * Z
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.paged_attention.contract import check_arguments
from kernels_pallas.paged_attention.pages import (
    Pages,
    QuantizedPages,
    cells_of,
    new_cells,
    scales_of,
    widened,
)

# Finite, so that a block with no visible key never computes inf - inf.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# Up to this many tokens there is one pass: a second one with wider tiles costs compile time.
FEW_TOKENS = 32
# A single tile's pages are copied one by one up to this many, and gathered above it.
FEW_PAGES = 8
# Up to this many query rows, reading keys and values as one array beats splitting it.
FEW_QUERIES = 16


def paged_attention_xla(  # noqa: PLR0913 - the contract of every implementation
    q_TNH: Float[Array, "T N H"],
    k_TKH: Float[Array, "T K H"],
    v_TKH: Float[Array, "T K H"],
    pages: Pages,
    layer: int | Int32[Array, ""],
    page_table_BM: Int32[Array, "B M"],
    kv_len_B: Int32[Array, "B"],
    query_start_B: Int32[Array, "B"],
    query_len_B: Int32[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    tile_tokens: int = 64,
    tiles_at_once: int = 1,
    block_tokens: int = 64,
) -> tuple[Float[Array, "T N H"], Pages]:
    """Writes the new keys and values into their pages, then attends causally row by row.

    A work list cuts every row's queries into tiles. Each tile runs an online softmax over the
    blocks of pages it can see, and stops after its own last one. Rows with one new token go
    first, in tiles of one, so that decoding never pays for a neighbour's prefill.

    Args:
      q_TNH: packed new queries; rows may be of any kind, in any order.
      k_TKH: their keys; stored in the pool's dtype.
      v_TKH: their values; likewise.
      pages: the pool of all layers `[L, P, K, Z, 2H]`, a token's key and value side by side; in
        8 bits, `QuantizedPages`. Its H may be larger than the heads', which zeros then pad.
      layer: which layer of the pool.
      page_table_BM: page ids of each row's sequence, all in range. Entries past the length are
        read and masked, so any page id is valid there (0 by convention).
      kv_len_B: tokens visible to the row, including this step's.
      query_start_B: the row's first token in T.
      query_len_B: the row's number of tokens in T; 0 for an empty row, which costs nothing.
      scale: factor on the scores, usually H ** -0.5.
      window: positions a query sees, counting back from its own; None = all.
      soft_cap: scores become cap * tanh(score / cap) before masking; None = no cap.
      sinks_N: an extra logit per head that takes weight but adds no value.
      tile_tokens: query tokens of a tile for rows with more than one; 1 drops that pass,
        which suits a program that only decodes.
      tiles_at_once: tiles computed together. 1 suits CPUs: no tile waits for a longer one,
        and a block stays in the cache. Wide devices need more.
      block_tokens: key positions per iteration of a tile's loop, rounded to whole pages. GPUs need
        large blocks, since each iteration waits for the host.

    Returns:
      Outputs in q's dtype, and the pool. A token of no row gets output 0 and is written to the
      null page.

    Raises:
      ValueError: if shapes or integer dtypes disagree, or a tile size is below 1.
      NotImplementedError: if the pool's dtype is neither a float of 16 or 32 bits nor, with
        scales, int8 or float8_e4m3fn.

    Donates: nothing by itself. Inside a jit that donates the pool, the update is in place if each
      layer's keys depend on the outputs of the layer before, as in a decoder.
    Cost: reads each visible page once per tile; memory linear in T and in the page table.
    Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867; paging, Kwon et al.,
      arXiv:2309.06180; sinks as in gpt-oss, arXiv:2508.10925.
    """
    rows = _Rows(kv_len_B, query_start_B, query_len_B)
    check_arguments(
        q_TNH,
        k_TKH,
        v_TKH,
        pages,
        page_table_BM,
        rows._asdict(),
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
    )
    if min(tile_tokens, tiles_at_once, block_tokens) < 1:
        raise ValueError(
            f"tile sizes must be >= 1; got {tile_tokens=}, {tiles_at_once=}, {block_tokens=}. "
            "Leave them out for the defaults."
        )
    head_dim = q_TNH.shape[2]
    q_TNH, k_TKH, v_TKH = widened(pages, q_TNH, k_TKH, v_TKH)
    pages = _write(pages, k_TKH, v_TKH, layer, page_table_BM, rows)
    attend = partial(
        _attend_rows,
        q_TNH=q_TNH,
        # Merging leading axes copies nothing; layer * P + page_id is the page's index.
        flat_pages=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pages),
        page_table_BM=page_table_BM + layer * cells_of(pages).shape[1],
        tiles_at_once=tiles_at_once,
        options=_Options(scale, window, soft_cap, sinks_N, block_tokens),
    )
    out_TNH = jnp.zeros_like(q_TNH)
    if tile_tokens == 1 or q_TNH.shape[0] <= FEW_TOKENS:
        return attend(out_TNH, rows, tile_tokens=1)[..., :head_dim], pages
    single_B = query_len_B == 1
    decoding = rows._replace(query_len_B=jnp.where(single_B, 1, 0))
    prefilling = rows._replace(query_len_B=jnp.where(single_B, 0, query_len_B))
    out_TNH = attend(out_TNH, decoding, tile_tokens=1)
    return attend(out_TNH, prefilling, tile_tokens=tile_tokens)[..., :head_dim], pages


class _Options(NamedTuple):
    scale: float
    window: int | None
    soft_cap: float | None
    sinks_N: Float[Array, "N"] | None
    block_tokens: int


class _Rows(NamedTuple):
    kv_len_B: Int32[Array, "B"]
    query_start_B: Int32[Array, "B"]
    query_len_B: Int32[Array, "B"]


class _Tiles(NamedTuple):
    """A work list, or the part of it in computation; its last entries may be empty."""

    row_X: Int32[Array, "X"]
    token_XU: Int32[Array, "X U"]  # indices into T; past the tile's last query, T itself
    position_XU: Int32[Array, "X U"]  # in the row's sequence; the last one repeats
    first_X: Int32[Array, "X"]  # first position of the row that the tile sees
    last_X: Int32[Array, "X"]  # last position that it sees; -1 for an empty tile


class _Block(NamedTuple):
    """A block of keys and values for each tile, [Y, K, S, H or 2H], and their scales."""

    key: Array
    value: Array
    key_scale_YKS: Float[Array, "Y K S"] | None
    value_scale_YKS: Float[Array, "Y K S"] | None


def _write(
    pages: Pages,
    k_TKH: Float[Array, "T K H"],
    v_TKH: Float[Array, "T K H"],
    layer: int | Int32[Array, ""],
    page_table_BM: Int32[Array, "B M"],
    rows: _Rows,
) -> Pages:
    kv_len_B, start_B, query_len_B = rows
    page_size = cells_of(pages).shape[3]
    token_T = jnp.arange(k_TKH.shape[0], dtype=jnp.int32)
    owns_TB = (start_B <= token_T[:, None]) & (token_T[:, None] < start_B + query_len_B)
    row_T, owned_T = jnp.argmax(owns_TB, axis=1), jnp.any(owns_TB, axis=1)
    position_T = token_T + (kv_len_B - query_len_B - start_B)[row_T]
    position_T = jnp.where(owned_T, position_T, 0)
    page_T = jnp.where(owned_T, page_table_BM[row_T, position_T // page_size], 0)
    # The barrier keeps XLA from fusing this into every layer's write: it is the same in all layers,
    # and on GPUs the fusion took half of the time to compile a decode of 128 rows.
    page_T, offset_T = lax.optimization_barrier((page_T, position_T % page_size))
    new_TK2H, new_scales_TK2 = new_cells(k_TKH, v_TKH, pages)
    if len(token_T) == 1:
        # Write one token twice: XLA turns a scatter of one into a slice update, fuses it
        # into each of its readers, and copies the whole pool for each of them.
        page_T, offset_T, new_TK2H, new_scales_TK2 = jax.tree.map(
            lambda x: jnp.repeat(x, 2, axis=0), (page_T, offset_T, new_TK2H, new_scales_TK2)
        )
    if not isinstance(pages, QuantizedPages):
        return pages.at[layer, page_T, :, offset_T].set(new_TK2H)
    return QuantizedPages(
        pages.cells_LPKZ2H.at[layer, page_T, :, offset_T].set(new_TK2H),
        pages.scales_LPK2Z.at[layer, page_T, :, :, offset_T].set(new_scales_TK2),
    )


def _attend_rows(
    out_TNH: Float[Array, "T N H"],
    rows: _Rows,
    *,
    q_TNH: Float[Array, "T N H"],
    flat_pages: Pages,  # [L * P, K, Z, 2H]
    page_table_BM: Int32[Array, "B M"],
    tile_tokens: int,
    tiles_at_once: int,
    options: _Options,
) -> Float[Array, "T N H"]:
    """Writes the outputs of the rows whose `query_len_B` is not 0."""
    num_tokens, num_rows = q_TNH.shape[0], page_table_BM.shape[0]
    # Each row's last tile may be short: sum of ceil(len / U) <= (T + B * (U - 1)) / U.
    num_tiles = min(num_tokens, (num_tokens + num_rows * (tile_tokens - 1)) // tile_tokens)
    tiles_at_once = min(tiles_at_once, num_tiles)
    num_tiles = -(-num_tiles // tiles_at_once) * tiles_at_once
    # The barrier: see `_write`.
    tiles, num_used = lax.optimization_barrier(
        _cut(rows, num_tokens, tile_tokens, num_tiles, options.window)
    )

    def compute(i, out_TNH):
        start = i * tiles_at_once
        now = _Tiles(*(lax.dynamic_slice_in_dim(a, start, tiles_at_once) for a in tiles))
        q_YUNH = q_TNH.at[now.token_XU].get(mode="fill", fill_value=0)
        out_YUNH = _attend_tiles(q_YUNH, now, flat_pages, page_table_BM, options)
        return out_TNH.at[now.token_XU].set(out_YUNH.astype(out_TNH.dtype), mode="drop")

    return lax.fori_loop(0, -(-num_used // tiles_at_once), compute, out_TNH)


def _cut(
    rows: _Rows, num_tokens: int, tile_tokens: int, num_tiles: int, window: int | None
) -> tuple[_Tiles, Int32[Array, ""]]:
    """Cuts rows into tiles, in order of rows; also returns the number of tiles in use."""
    count_B = -(-rows.query_len_B // tile_tokens)
    end_B = jnp.cumsum(count_B, dtype=jnp.int32)
    tile_X = jnp.arange(num_tiles, dtype=jnp.int32)
    row_X = jnp.searchsorted(end_B, tile_X, side="right", method="compare_all")
    row_X = jnp.minimum(row_X, len(count_B) - 1).astype(jnp.int32)
    skipped_X = (tile_X - (end_B - count_B)[row_X]) * tile_tokens
    lane_XU = skipped_X[:, None] + jnp.arange(tile_tokens, dtype=jnp.int32)  # of the row's queries
    used_X = tile_X < end_B[-1]
    live_XU = used_X[:, None] & (lane_XU < rows.query_len_B[row_X][:, None])
    position_XU = (rows.kv_len_B - rows.query_len_B)[row_X][:, None] + lane_XU
    # Lanes past the tile's last query repeat its position, so they see the same cells.
    position_XU = jnp.minimum(position_XU, rows.kv_len_B[row_X][:, None] - 1)
    lookback = position_XU[:, 0] if window is None else window - 1
    tiles = _Tiles(
        row_X=row_X,
        token_XU=jnp.where(live_XU, rows.query_start_B[row_X][:, None] + lane_XU, num_tokens),
        position_XU=position_XU,
        first_X=jnp.maximum(0, position_XU[:, 0] - lookback),
        last_X=jnp.where(used_X, position_XU[:, -1], -1),
    )
    return tiles, end_B[-1]


def _attend_tiles(
    q_YUNH: Float[Array, "Y U N H"],
    tiles: _Tiles,
    flat_pages: Pages,  # [L * P, K, Z, 2H]
    page_table_BM: Int32[Array, "B M"],
    options: _Options,
) -> Float[Array, "Y U N H"]:
    """Runs the online softmax of a few tiles over all blocks of pages that they can see."""
    _, num_kv_heads, page_size, _ = cells_of(flat_pages).shape
    num_tiles, tile_tokens, num_q_heads, head_dim = q_YUNH.shape
    group = num_q_heads // num_kv_heads
    pages_per_block = min(max(1, options.block_tokens // page_size), page_table_BM.shape[1])
    block_tokens = pages_per_block * page_size
    first_block_Y = tiles.first_X // block_tokens
    position_YQ = jnp.repeat(tiles.position_XU, group, axis=1)

    q_YUKGH = q_YUNH.reshape(num_tiles, tile_tokens, num_kv_heads, group, head_dim)
    q_YKQH = q_YUKGH.swapaxes(1, 2).reshape(num_tiles, num_kv_heads, -1, head_dim)
    joined = tile_tokens * group <= FEW_QUERIES
    if joined:  # zeros multiply the values' half of a cell; the keys' half is dropped below
        q_YKQH = jnp.concatenate([q_YKQH, jnp.zeros_like(q_YKQH)], axis=-1)

    def attend_block(j, carry):
        block_Y = first_block_Y + j
        key_YS = block_Y[:, None] * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)
        owns_YS = (tiles.first_X[:, None] <= key_YS) & (key_YS <= tiles.last_X[:, None])
        cells, scales = _load(flat_pages, page_table_BM, tiles.row_X, block_Y, pages_per_block)
        # Masking the weights is not enough: an unused cell may hold NaN, and 0 * NaN is NaN.
        cells = jnp.where(owns_YS[:, None, :, None], cells, 0)
        if scales is None:
            key_scale, value_scale = None, None
        else:
            # In float16 a small softmax weight times a small scale would underflow.
            is_half = q_YKQH.dtype == jnp.float16
            cells = cells.astype(jnp.float32 if is_half else q_YKQH.dtype)
            scales = jnp.where(owns_YS[:, None, None], scales, 0)
            key_scale, value_scale = scales[:, :, 0], scales[:, :, 1]
        key, value = (cells, cells) if joined else jnp.split(cells, 2, axis=-1)
        block = _Block(key, value, key_scale, value_scale)
        ago_YQS = position_YQ[..., None] - key_YS[:, None]
        sees_YQS = ago_YQS >= 0
        if options.window is not None:
            sees_YQS &= ago_YQS < options.window
        return _accumulate(carry, q_YKQH, block, sees_YQS, options)

    num_blocks = jnp.max(tiles.last_X // block_tokens + 1 - first_block_Y)
    start = _start(q_YKQH, group, options.sinks_N)
    _, total_YKQ, weighted = lax.fori_loop(0, num_blocks, attend_block, start)
    out_YKQH = weighted[..., -head_dim:] / jnp.maximum(total_YKQ, 1e-30)[..., None]
    out_YKUGH = out_YKQH.reshape(num_tiles, num_kv_heads, tile_tokens, group, head_dim)
    return out_YKUGH.swapaxes(1, 2).reshape(q_YUNH.shape)


def _load(
    flat_pages: Pages,  # [L * P, K, Z, 2H]
    page_table_BM: Int32[Array, "B M"],
    row_Y: Int32[Array, "Y"],
    block_Y: Int32[Array, "Y"],
    pages_per_block: int,
) -> tuple[Array, Float[Array, "Y K 2 S"] | None]:
    """Loads one block of cells `[Y, K, S, 2H]` for each tile, and its scales, if any."""
    # The last block may reach past the table: it reads the last page again, which is masked.
    last_page = page_table_BM.shape[1] - 1
    page_YC = block_Y[:, None] * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)
    page_YC = jnp.minimum(page_YC, last_page)
    page_id_YC = page_table_BM.at[row_Y[:, None], page_YC].get(mode="promise_in_bounds")
    load = partial(_load_part, page_id_YC=page_id_YC)
    scales = scales_of(flat_pages)
    return load(cells_of(flat_pages), 3), None if scales is None else load(scales, 4)


def _load_part(pool: Array, token_axis: int, *, page_id_YC: Int32[Array, "Y C"]) -> Array:
    """Joins pages of cells [L * P, K, Z, 2H] or scales [L * P, K, 2, Z] along their tokens."""
    num_tiles, num_pages = page_id_YC.shape
    if num_tiles > 1 or num_pages > FEW_PAGES:
        pages = jnp.moveaxis(_take(pool, page_id_YC), 1, token_axis - 1)
        shape = pages.shape
        return pages.reshape(*shape[: token_axis - 1], -1, *shape[token_axis + 1 :])
    # One page at a time for CPUs, which compute one tile at a time: XLA turns these slices into
    # plain copies, but a gather into a loop over elements. With many pages, as in a GPU's large
    # blocks, the slices take XLA longer to compile than the rest of a layer.
    pages = [_take(pool, page_id_YC[:, i]) for i in range(num_pages)]
    return jnp.concatenate(pages, axis=token_axis - 1)


def _take(pool: Array, page_ids: Int32[Array, "..."]) -> Array:
    return pool.at[page_ids].get(mode="promise_in_bounds")


def _start(
    q_YKQH: Array, group: int, sinks_N: Float[Array, "N"] | None
) -> tuple[Array, Array, Array]:
    """The online softmax before its first key: (peak score, total weight, weighted values)."""
    shape_YKQ, num_kv_heads = q_YKQH.shape[:3], q_YKQH.shape[1]
    weighted = jnp.zeros(q_YKQH.shape, jnp.float32)
    if sinks_N is None:
        return jnp.full(shape_YKQ, MASKED, jnp.float32), jnp.zeros(shape_YKQ, jnp.float32), weighted
    sinks_KG = sinks_N.astype(jnp.float32).reshape(num_kv_heads, group)
    peak_KQ = jnp.tile(sinks_KG, (1, shape_YKQ[2] // group))
    return jnp.broadcast_to(peak_KQ, shape_YKQ), jnp.ones(shape_YKQ, jnp.float32), weighted


def _accumulate(
    carry: tuple[Array, Array, Array],
    q_YKQH: Array,
    block: _Block,
    sees_YQS: Bool[Array, "Y Q S"],
    options: _Options,
) -> tuple[Array, Array, Array]:
    """One step of the online softmax."""
    peak_YKQ, total_YKQ, weighted = carry
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    score_YKQS = einsum("YKQH,YKSH->YKQS", q_YKQH, block.key) * options.scale
    if block.key_scale_YKS is not None:
        score_YKQS *= block.key_scale_YKS[:, :, None]
    if options.soft_cap is not None:
        score_YKQS = options.soft_cap * jnp.tanh(score_YKQS / options.soft_cap)
    score_YKQS = jnp.where(sees_YQS[:, None], score_YKQS, MASKED)
    new_peak_YKQ = jnp.maximum(peak_YKQ, jnp.max(score_YKQS, axis=-1))
    # Before a query's first visible key its sums are garbage, but finite; that key then multiplies
    # them by exp(MASKED - peak) = 0.
    weight_YKQS = jnp.exp(score_YKQS - new_peak_YKQ[..., None])
    fade_YKQ = jnp.exp(peak_YKQ - new_peak_YKQ)
    total_YKQ = total_YKQ * fade_YKQ + jnp.sum(weight_YKQS, axis=-1)
    if block.value_scale_YKS is not None:
        weight_YKQS *= block.value_scale_YKS[:, :, None]
    update = einsum("YKQS,YKSH->YKQH", weight_YKQS.astype(block.value.dtype), block.value)
    return new_peak_YKQ, total_YKQ, weighted * fade_YKQ[..., None] + update
