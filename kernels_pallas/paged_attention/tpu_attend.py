"""The TPU kernel that attends: pages stream through two buffers past a block of queries."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.pages import Pages, cells_of, scales_of
from kernels_pallas.paged_attention.tpu_stream import Stream
from kernels_pallas.paged_attention.tpu_work import AttendItems, Rows, attend_items

# Finite, so that a block with no visible key never computes inf - inf.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
LANES = 128


class AttendOptions(NamedTuple):
    scale: float
    window: int | None
    soft_cap: float | None
    block_tokens: int
    interpret: Any


def attend_rows(
    q_TNH: Float[Array, "T N H"],
    sinks_N: Float[Array, "N"] | None,
    pages: Pages,
    layer: int | Int32[Array, ""],
    page_table_BM: Int32[Array, "B M"],
    rows: Rows,
    tile_tokens: int,
    options: AttendOptions,
) -> Float[Array, "T N H"]:
    """Attends for the rows whose `query_len_B` is not 0; other tokens' outputs are garbage."""
    num_tokens, num_q_heads, head_dim = q_TNH.shape
    _, _, num_kv_heads, page_size, _ = cells_of(pages).shape
    group = num_q_heads // num_kv_heads
    items, num_used = attend_items(rows, tile_tokens, num_tokens)
    # Half a cell may not be whole lanes. Then keys and values stay joined: zeros in the queries
    # multiply the values, and only the values' half of the outputs is kept.
    joined = head_dim % LANES != 0
    q_IKQO = _pack(q_TNH, num_kv_heads, tile_tokens, joined)
    num_blocks, _, num_queries, lanes = q_IKQO.shape
    peak_KQ1 = _first_peak(sinks_N, num_kv_heads, group, num_queries)
    pages_per_block = max(1, options.block_tokens // page_size)
    pages_per_block = min(pages_per_block, page_table_BM.shape[1])
    # Padded to whole tiles, so that a line of the table is one copy.
    more_pages = -page_table_BM.shape[1] % LANES
    table_B1M = jnp.pad(page_table_BM, ((0, 0), (0, more_pages)))[:, None]

    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), num_used.reshape(1), *items)
    block = pl.BlockSpec(
        (1, num_kv_heads, num_queries, lanes),
        lambda i, layer_ref, num_ref, block_ref, *_: (block_ref[i], 0, 0, 0),
    )
    softmax = pltpu.VMEM((num_kv_heads, num_queries, 1), jnp.float32)
    first_total = 0.0 if sinks_N is None else 1.0
    kernel = partial(_attend_kernel, group=group, first_total=first_total, options=options)
    out_IKQO = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q_IKQO.shape, q_IKQO.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            # At least 1: without work, item 0 has no tokens and reads no page.
            grid=(jnp.maximum(num_used, 1),),
            in_specs=[
                block,
                pl.BlockSpec(peak_KQ1.shape, lambda *_: (0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), pages),
            ],
            out_specs=block,
            scratch_shapes=[
                jax.tree.map(
                    lambda x: pltpu.VMEM((2, pages_per_block, *x.shape[2:]), x.dtype), pages
                ),
                pltpu.SMEM((2, *table_B1M.shape[1:]), jnp.int32),
                softmax,
                softmax,
                pltpu.VMEM((num_kv_heads, num_queries, lanes), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=options.interpret,
        name=f"paged_attention_{tile_tokens}",
    )(*scalars, q_IKQO, peak_KQ1, table_B1M, pages)
    return _unpack(out_IKQO, q_TNH.shape, tile_tokens)


def _pack(q_TNH: Array, num_kv_heads: int, tile_tokens: int, joined: bool) -> Array:
    """Makes one matrix of each kv head's queries of a block; its rows are token-major."""
    num_tokens, num_q_heads, head_dim = q_TNH.shape
    group = num_q_heads // num_kv_heads
    num_blocks = -(-num_tokens // tile_tokens)
    more_tokens = num_blocks * tile_tokens - num_tokens
    q_TNO = jnp.pad(q_TNH, ((0, more_tokens), (0, 0), (0, head_dim if joined else 0)))
    q_IUKGO = q_TNO.reshape(num_blocks, tile_tokens, num_kv_heads, group, -1)
    return q_IUKGO.swapaxes(1, 2).reshape(num_blocks, num_kv_heads, tile_tokens * group, -1)


def _unpack(out_IKQO: Array, shape_TNH: tuple[int, ...], tile_tokens: int) -> Array:
    num_tokens, num_q_heads, head_dim = shape_TNH
    num_blocks, num_kv_heads, _, lanes = out_IKQO.shape
    group = num_q_heads // num_kv_heads
    out_IKUGO = out_IKQO.reshape(num_blocks, num_kv_heads, tile_tokens, group, lanes)
    out_TNO = out_IKUGO.swapaxes(1, 2).reshape(num_blocks * tile_tokens, num_q_heads, lanes)
    return out_TNO[:num_tokens, :, lanes - head_dim :]


def _first_peak(
    sinks_N: Float[Array, "N"] | None, num_kv_heads: int, group: int, num_queries: int
) -> Float[Array, "K Q 1"]:
    if sinks_N is None:
        return jnp.full((num_kv_heads, num_queries, 1), MASKED, jnp.float32)
    sinks_KG = sinks_N.astype(jnp.float32).reshape(num_kv_heads, group)
    return jnp.tile(sinks_KG, (1, num_queries // group))[..., None]


class _Refs(NamedTuple):
    """The kernel's arguments after its scalars, in the order that `attend_rows` passes them."""

    q: Any  # [1, K, Q, O]
    first_peak: Any  # [K, Q, 1]
    table_hbm: Any  # [B, 1, M]
    pages_hbm: Pages  # [L, P, K, Z, 2H]
    out: Any  # [1, K, Q, O]
    pages: Pages  # [2, C, K, Z, 2H], the two page buffers
    table: Any  # [2, 1, M] in scalar memory: the lines of this item and the next one
    peak: Any  # [K, Q, 1], the online softmax's highest score so far
    total: Any  # [K, Q, 1], its sum of weights
    weighted: Any  # [K, Q, O], its sum of weighted values
    turn: Any  # [1], the page buffer of this item's first block
    page_sems: Any
    table_sems: Any


def _attend_kernel(layer_ref, num_ref, *refs, group, first_total, options):
    items, refs = AttendItems(*refs[:5]), _Refs(*refs[5:])
    stream = Stream(
        items=items,
        layer=layer_ref[0],
        window=options.window,
        table_hbm=refs.table_hbm,
        pages_hbm=refs.pages_hbm,
        table=refs.table,
        pages=refs.pages,
        table_sems=refs.table_sems,
        page_sems=refs.page_sems,
    )
    i = pl.program_id(0)
    has_next = i + 1 < num_ref[0]
    num_blocks = stream.num_blocks(i)

    @pl.when(i == 0)
    def _():
        refs.turn[0] = 0
        stream.table_copy(0).start()
        stream.table_copy(0).wait()
        stream.start(0, 0, 0)

    @pl.when(has_next)
    def _():
        stream.table_copy(i + 1).start()

    refs.peak[...] = refs.first_peak[...]
    refs.total[...] = jnp.full(refs.total.shape, first_total, jnp.float32)
    refs.weighted[...] = jnp.zeros(refs.weighted.shape, jnp.float32)
    turn = refs.turn[0]

    def attend_block(j, carry):
        buffer = lax.rem(turn + j, 2)

        @pl.when(j + 1 < num_blocks)
        def _():
            stream.start(i, j + 1, 1 - buffer)

        @pl.when((j + 1 == num_blocks) & has_next)
        def _():
            stream.table_copy(i + 1).wait()
            stream.start(i + 1, 0, 1 - buffer)

        stream.wait(i, j, buffer)
        stream.clean(i, j, buffer)
        # The position of lane 0 of the block of queries, which may belong to another row.
        position = items.position_X[i] - items.first_X[i]
        sees_QS = _sees(refs, stream.first_key(i, j) - position, group, options.window)
        for head in range(refs.q.shape[1]):
            _accumulate(refs, head, buffer, sees_QS, options)
        return carry

    lax.fori_loop(0, num_blocks, attend_block, 0)
    refs.turn[0] = lax.rem(turn + num_blocks, 2)
    _finish(refs, items, i, group)


def _sees(refs: _Refs, ahead: Any, group: int, window: int | None) -> Any:
    """Mask of the keys of a block that each query sees.

    `ahead` is the first key's position minus lane 0's. Row q of the queries is token q // G of the
    block. It sees a key if ahead <= q // G, which is ahead * G <= q without dividing vectors.
    """
    _, pages_per_block, _, page_size, _ = cells_of(refs.pages).shape
    shape_QS = (refs.q.shape[2], pages_per_block * page_size)
    query_QS = lax.broadcasted_iota(jnp.int32, shape_QS, 0)
    ahead_QS = (ahead + lax.broadcasted_iota(jnp.int32, shape_QS, 1)) * group
    sees_QS = ahead_QS <= query_QS
    return sees_QS if window is None else sees_QS & (ahead_QS + window * group > query_QS)


def _accumulate(refs: _Refs, head: int, buffer: Any, sees_QS: Any, options: AttendOptions) -> None:
    """Adds one block to one kv head's online softmax."""
    cells, lanes = cells_of(refs.pages), refs.q.shape[3]
    width = cells.shape[4]
    # bfloat16 times bfloat16, or times 8 bits, which bfloat16 holds, is exact in one pass. Wider
    # dtypes use float32 throughout.
    exact = refs.q.dtype == jnp.bfloat16 and cells.dtype != jnp.float32
    dtype = jnp.bfloat16 if exact else jnp.float32
    dot = partial(
        lax.dot_general,
        precision=None if exact else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    key_SO = cells[buffer, :, head, :, pl.ds(0, lanes)].reshape(-1, lanes).astype(dtype)
    values = cells[buffer, :, head, :, pl.ds(width - lanes, lanes)]
    value_SO = values.reshape(-1, lanes).astype(dtype)
    query_QO = refs.q[0, head].astype(dtype)
    score_QS = dot(query_QO, key_SO, (((1,), (1,)), ((), ()))) * options.scale
    scales = scales_of(refs.pages)
    if scales is not None:
        score_QS *= _in_line(scales, buffer, head, 0)
    if options.soft_cap is not None:
        score_QS = options.soft_cap * jnp.tanh(score_QS / options.soft_cap)
    score_QS = jnp.where(sees_QS, score_QS, MASKED)
    peak_Q1 = refs.peak[head]
    new_peak_Q1 = jnp.maximum(peak_Q1, jnp.max(score_QS, axis=1, keepdims=True))
    # Before a query's first visible key its sums are garbage, but finite; that key then multiplies
    # them by exp(MASKED - peak) = 0.
    weight_QS = jnp.exp(score_QS - new_peak_Q1)
    fade_Q1 = jnp.exp(peak_Q1 - new_peak_Q1)
    refs.peak[head] = new_peak_Q1
    refs.total[head] = refs.total[head] * fade_Q1 + jnp.sum(weight_QS, axis=1, keepdims=True)
    if scales is not None:
        weight_QS *= _in_line(scales, buffer, head, 1)
    update_QO = dot(weight_QS.astype(dtype), value_SO, (((1,), (0,)), ((), ())))
    refs.weighted[head] = refs.weighted[head] * fade_Q1 + update_QO


def _in_line(scales: Any, buffer: Any, head: int, half: int) -> Any:
    """The scales of a block's keys (half 0) or values (1), concatenated to one row [1, S]."""
    pages = [scales[buffer, c, head, pl.ds(half, 1)] for c in range(scales.shape[1])]
    return jnp.concatenate(pages, axis=1)


def _finish(refs: _Refs, items: AttendItems, i: Any, group: int) -> None:
    """Writes the item's rows of the block's output; other items' rows stay."""
    block = items.block_X[i]

    @pl.when((i == 0) | (block != items.block_X[jnp.maximum(i - 1, 0)]))
    def _():
        refs.out[...] = jnp.zeros(refs.out.shape, refs.out.dtype)

    _, num_kv_heads, num_queries, lanes = refs.out.shape
    query = lax.broadcasted_iota(jnp.int32, (num_queries, lanes), 0)
    first = items.first_X[i] * group
    mine = (query >= first) & (query < first + items.count_X[i] * group)
    for head in range(num_kv_heads):
        mean = refs.weighted[head] / jnp.maximum(refs.total[head], 1e-30)
        kept = jnp.where(mine, mean, refs.out[0, head].astype(jnp.float32))
        refs.out[0, head] = kept.astype(refs.out.dtype)
