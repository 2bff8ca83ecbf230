"""The Mosaic GPU kernel of paged attention: one block per (tile, part of its context, kv head).

Axis letters: see `gpu.py`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.gpu_tiles import BLOCK_TOKENS, QUERY_ROWS_OF_UNIT
from kernels_pallas.paged_attention.pages import Pages, QuantizedPages, cells_of, scales_of

ROW_BYTES = 128  # a swizzled row of shared memory; wgmma reads eight rows at a time
LANES = 64  # 16-bit values in such a row; a block has as many keys
COMPUTE, COPY = 0, 1  # the two warpgroups
LOG2E = math.log2(math.e)
# Finite, so that a block with no visible key never computes inf - inf.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclass(frozen=True, kw_only=True)
class AttendOptions:
    """The static options of a kernel; hashable."""

    group: int  # query heads per kv head
    scale: float
    window: int | None
    soft_cap: float | None
    num_parts: int
    num_stages: int
    unit: str  # the matrix unit: wgmma or tcgen05
    interpret: Any

    @property
    def query_rows(self) -> int:
        return QUERY_ROWS_OF_UNIT[self.unit]

    @property
    def layout(self) -> Any:
        """The layout of a product over the threads of a warpgroup."""
        return {"wgmma": plgpu.Layout.WGMMA, "tcgen05": plgpu.Layout.TCGEN05}[self.unit]


def attend_tiles(
    tile_X4: Int32[Array, "X 4"],
    table_BM: Int32[Array, "B M"],
    q_XKQH: Float[Array, "X K Q H"],
    pages: Pages,
    options: AttendOptions,
) -> tuple[Float[Array, "X C K Q H"], Float[Array, "X C K R"]]:
    """Attends from each tile to its row's pages, or to a part of them.

    One warpgroup looks pages up in the table and copies them by TMA into a ring of stages of 64
    keys. The other computes: two products of R query rows (a tile may use fewer), with an online
    softmax in registers between them. R is 64 with Hopper's wgmma and 128 with Blackwell's
    tcgen05, whose products land in tensor memory. Softmax weights go through shared memory, since
    interpret mode supports only that; on a Hopper, reading them from registers would save a trip.
    A stage of 8-bit cells is first converted to bfloat16, which holds them exactly, in a buffer
    beside the ring. A key's scale then multiplies its column of the scores, a value's scale its
    column of the weights.

    Args:
      tile_X4: each tile's row, the positions of the first and last key that it sees, and
        the position of its first query. A last position of -1 marks an unused tile.
      table_BM: page ids, already offset to one layer's pages.
      q_XKQH: query rows, `group` of them per token; Q is a multiple of 8, at most R.
      pages: the pool with leading axes merged: [P*K, Z, 2H], and scales [P*K, 2, Z] if any.
      options: static options of the kernel.

    Returns:
      For each part of each tile's context: the outputs, and log2 of the total weights that divided
      them, which is very low if the part has no visible key.

    Cost: reads each page from the first to the last key once per tile. Shared memory: keys and
      values of 64 tokens per stage, R rows of queries (later outputs) and of weights; with 8-bit
      pages also keys and values of 64 tokens in 16 bits. One block per multiprocessor.
      sm_90a, no spills: at head_dim 64, 80 kB and 150 registers (8-bit pages: 66 kB, 216);
      at 128, 152 kB and 220 (8-bit: 122 kB, 255). At 256, 255 registers and spills: 168 kB and
      428 to 508 bytes spilled (8-bit: 169 kB and 148 bytes).
      sm_100a: 16 kB more at 64, with 246 registers; 24 kB more at 128, with 255 registers and
      268 bytes spilled (8-bit: 540).
    """
    num_tiles, num_kv_heads, num_rows, head_dim = q_XKQH.shape
    grid = (num_tiles, options.num_parts, num_kv_heads)
    scratch = _scratch(q_XKQH.dtype, head_dim, pages, options)
    interpret = options.interpret or None
    if interpret is True:
        # Pyright checks against jax 0.10, which lacks this simulator.
        interpret = plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]
    attend = plgpu.kernel(
        # A new object on each call: JAX 0.11 caches a kernel's jaxpr by its function's identity.
        partial(_kernel, options=options),
        out_type=(
            jax.ShapeDtypeStruct((*grid, num_rows, head_dim), q_XKQH.dtype),
            jax.ShapeDtypeStruct((*grid, options.query_rows), jnp.float32),
        ),
        scratch_types=scratch,
        grid=grid,
        grid_names=("tile", "part", "kv_head"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="paged_attention",
    )
    return attend(tile_X4, table_BM, q_XKQH, pages)


def _scratch(dtype: Any, head_dim: int, pages: Pages, options: AttendOptions) -> list[Any]:
    cells, quantized = cells_of(pages), isinstance(pages, QuantizedPages)
    num_stages, query_rows = options.num_stages, options.query_rows
    ring = _tiled_smem(cells.dtype, num_stages, BLOCK_TOKENS, 2 * head_dim)
    if quantized:
        scales: Any = plgpu.SMEM((num_stages, 2, BLOCK_TOKENS), jnp.float32)
        ring = QuantizedPages(ring, scales)
    # Per page: one copy of cells, and with scales one copy of the keys' and one of the values'.
    copies = BLOCK_TOKENS // min(BLOCK_TOKENS, cells.shape[1]) * (3 if quantized else 1)
    tensor = None
    if options.unit == "tcgen05":
        # The result of either product, and the barrier that says it is complete.
        product = plgpu.TMEM((query_rows, LANES), jnp.float32)
        tensor = (product, plgpu.Barrier(orders_tensor_core=True))
    return [
        _tiled_smem(dtype, query_rows, head_dim),  # queries, then outputs
        ring,
        # The current block in 16 bits, if the ring holds 8 bits.
        _tiled_smem(dtype, BLOCK_TOKENS, 2 * head_dim) if quantized else None,
        _tiled_smem(dtype, query_rows, BLOCK_TOKENS),  # softmax weights
        tensor,
        plgpu.SMEM((query_rows,), jnp.float32),
        plgpu.Barrier(),  # queries have arrived
        plgpu.Barrier(num_arrivals=copies, num_barriers=num_stages),  # a stage is full
        plgpu.Barrier(num_barriers=num_stages),  # a stage may be filled again
    ]


def _tiled_smem(dtype: Any, *shape: int) -> Any:
    transforms = (
        plgpu.TilingTransform((8, ROW_BYTES // jnp.dtype(dtype).itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(ROW_BYTES),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _kernel(tile_ref, table_ref, q_ref, pages_ref, out_ref, log_ref, *scratch, options):
    #       [X, 4]    [B, M]     [X,K,Q,H] [P*K,Z,2H] [X,C,K,Q,H] [X,C,K,R]
    tile, part, kv_head = (lax.axis_index(name) for name in ("tile", "part", "kv_head"))
    warpgroup = lax.axis_index("warpgroup")
    row, *span = (tile_ref[tile, i] for i in range(4))
    first_block, num_blocks = _part(span, part, options.num_parts)
    q_smem, ring, wide_smem, weight_smem, tensor, log_smem, q_here, full, free = scratch
    used_smem = q_smem.at[pl.ds(0, q_ref.shape[2])]

    @pl.when((warpgroup == COPY) & (num_blocks > 0))
    def _():
        plgpu.copy_gmem_to_smem(q_ref.at[tile, kv_head], used_smem, q_here)
        head = (q_ref.shape[1], kv_head)
        copy = partial(_copy_block, pages_ref, table_ref.at[row], ring, full, head, span[1])

        @pl.loop(0, num_blocks)
        def _(j):
            stage = lax.rem(j, options.num_stages)

            @pl.when(j >= options.num_stages)
            def _():
                plgpu.barrier_wait(free.at[stage])

            copy(first_block + j, stage)

    @pl.when(warpgroup == COMPUTE)
    def _():
        @pl.when(num_blocks > 0)
        def _():
            plgpu.barrier_wait(q_here)

        buffers = (q_smem, ring, wide_smem, weight_smem, tensor, full, free)
        blocks = (first_block, num_blocks)
        step = partial(_accumulate, buffers, span, blocks, options)
        weighted, peak, total = lax.fori_loop(0, num_blocks, step, _start(q_ref.shape[3], options))
        # Without a visible key, the output is 0 and the total weight tiny.
        total = jnp.maximum(total, 1e-30)
        for i, lanes in enumerate(weighted):
            out_smem = q_smem.at[:, pl.ds(i * LANES, LANES)]
            out_smem[...] = (lanes / _along_rows(total)).astype(q_smem.dtype)
        log_smem[...] = peak + jnp.log(total) * LOG2E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(used_smem, out_ref.at[tile, part, kv_head])
        plgpu.copy_smem_to_gmem(log_smem, log_ref.at[tile, part, kv_head])
        plgpu.wait_smem_to_gmem(0)


def _part(span, part, num_parts: int):
    """The index of a part's first block of keys, and its number of blocks."""
    first, last, _ = span
    first_block = lax.div(first, BLOCK_TOKENS)
    num_blocks = lax.select(last < 0, 0, lax.div(last, BLOCK_TOKENS) + 1 - first_block)
    start = lax.div(num_blocks * part, num_parts)
    return first_block + start, lax.div(num_blocks * (part + 1), num_parts) - start


def _copy_block(pages_ref, line_ref, ring, full, head, last, block, stage):
    """Starts copying 64 tokens' keys and values; past the last page repeats it, to be masked."""
    cells_ref, scales_ref = _cells_and_scales(pages_ref)
    cells_smem, scales_smem = _cells_and_scales(ring)
    (num_kv_heads, kv_head), page_size = head, cells_ref.shape[1]
    copied = min(page_size, BLOCK_TOKENS)  # tokens per copy
    for start in range(0, BLOCK_TOKENS, copied):
        token = block * BLOCK_TOKENS + start
        page = lax.div(lax.min(token, last), page_size)
        offset = lax.rem(token, page_size) if page_size > copied else 0
        index = line_ref[page] * num_kv_heads + kv_head
        here, there = pl.ds(offset, copied), pl.ds(start, copied)
        copy = partial(plgpu.copy_gmem_to_smem, barrier=full.at[stage])
        copy(cells_ref.at[index, here], cells_smem.at[stage, there])
        if scales_ref is not None:
            for half in range(2):
                copy(scales_ref.at[index, half, here], scales_smem.at[stage, half, there])


def _cells_and_scales(refs: Any) -> tuple[Any, Any]:
    """The references to cells and to scales (None without scales)."""
    return cells_of(refs), scales_of(refs)


def _start(head_dim: int, options: AttendOptions):
    """The online softmax before its first key: weighted values, peak score, total weight."""

    def filled(value: float, *shape: int):
        layout = options.layout if len(shape) == 2 else options.layout.reduce(1)
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    lanes = filled(0, options.query_rows, LANES)
    peak, total = filled(MASKED, options.query_rows), filled(0, options.query_rows)
    return (lanes,) * (head_dim // LANES), peak, total


def _accumulate(buffers, span, blocks, options, j, carry):
    """One block's step of the online softmax, in powers of two."""
    q_smem, ring, wide_smem, weight_smem, tensor, full, free = buffers
    (first, last, position), (first_block, num_blocks) = span, blocks
    weighted, peak, total = carry
    head_dim = q_smem.shape[1]
    stage = lax.rem(j, options.num_stages)
    start = (first_block + j) * BLOCK_TOKENS
    plgpu.barrier_wait(full.at[stage])

    column = options.layout.reduce(0)
    kv_smem, key_scale, value_scale = _ready(ring, wide_smem, stage, column)
    key_smem = kv_smem.at[:, pl.ds(0, head_dim)]
    value_smem = kv_smem.at[:, pl.ds(head_dim, head_dim)]
    multiply = partial(_multiply, tensor)
    score = multiply(q_smem, key_smem.transpose((1, 0)))
    if key_scale is not None:
        score *= _along_keys(key_scale, options)
    score = _scaled(score, options)

    def mask(score):
        # A weight of 0 is not enough: a cell of another row may hold NaN.
        _clear(value_smem, first - start, last - start)
        return jnp.where(_visible(start, position, last, options), score, MASKED)

    at_edge = start + BLOCK_TOKENS - 1 > position
    if options.window is not None:
        at_edge |= start <= last - options.window
    score = lax.cond(at_edge, mask, lambda score: score, score)
    new_peak = jnp.maximum(peak, jnp.max(score, axis=1))
    fade = jnp.exp2(peak - new_peak)
    weight = jnp.exp2(score - _along_rows(new_peak))
    total = total * fade + jnp.sum(weight, axis=1)
    if value_scale is not None:
        # The scale of another row's cell may be NaN too.
        key = start + _iota(0, (BLOCK_TOKENS,), column)
        owned = (first <= key) & (key <= last)
        weight *= _along_keys(jnp.where(owned, value_scale, 0), options)
    weight_smem[...] = weight.astype(weight_smem.dtype)
    plgpu.commit_smem()
    # 64 lanes at a time, so that registers hold one such product at once.
    new_weighted = []
    for i, lanes in enumerate(weighted):
        update = multiply(weight_smem, value_smem.at[:, pl.ds(i * LANES, LANES)])
        new_weighted.append(lanes * _along_rows(fade) + update)

    # All products have read the stage only now. Nobody waits for the last stages.
    @pl.when(j + options.num_stages < num_blocks)
    def _():
        plgpu.barrier_arrive(free.at[stage])

    return tuple(new_weighted), new_peak, total


def _ready(ring, wide_smem, stage, column):
    """A stage's cells in 16 bits, and the scales of its keys and of its values, if any."""
    cells_smem, scales_smem = _cells_and_scales(ring)
    if scales_smem is None:
        return cells_smem.at[stage], None, None
    # Each warp has waited for its own product only; after this, all have read the last block.
    plgpu.commit_smem()
    for lane in range(0, wide_smem.shape[1], ROW_BYTES):
        lanes = pl.ds(lane, ROW_BYTES)
        cells = _load(cells_smem.at[stage, :, lanes], plgpu.Layout.WGMMA_UPCAST_2X)
        if jnp.issubdtype(cells.dtype, jnp.floating):
            cells = cells.astype(jnp.float32)  # Mosaic has no direct conversion from float8
        wide_smem[:, lanes] = cells.astype(wide_smem.dtype)
    plgpu.commit_smem()
    return wide_smem, *(_load(scales_smem.at[stage, half], column) for half in range(2))


def _load(ref, layout):
    # Pyright checks against jax 0.10, which still requires `idx`.
    return plgpu.load(ref, layout=layout)  # pyright: ignore[reportCallIssue]


def _multiply(tensor, left_smem, right_smem):
    if tensor is not None:
        product_tmem, done = tensor
        plgpu.tcgen05_mma(product_tmem, left_smem, right_smem, done, accumulate=False)
        plgpu.barrier_wait(done)
        product = plgpu.async_load_tmem(product_tmem, layout=plgpu.Layout.TCGEN05)
        plgpu.wait_load_tmem()  # all warps: the next product overwrites this one
        return product

    def multiply(product):
        plgpu.wgmma(product, left_smem, right_smem)
        return product[...]  # waits for the product

    shape = (left_smem.shape[0], right_smem.shape[1])
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _clear(value_smem, first, last):
    """Zeroes all rows outside first .. last."""
    key = _iota(0, (BLOCK_TOKENS, LANES), plgpu.Layout.WGMMA)
    owned = (first <= key) & (key <= last)
    for lane in range(0, value_smem.shape[1], LANES):
        part_smem = value_smem.at[:, pl.ds(lane, LANES)]
        part_smem[...] = jnp.where(owned, _load(part_smem, plgpu.Layout.WGMMA), 0)


def _scaled(score, options: AttendOptions):
    if options.soft_cap is None:
        return score * (options.scale * LOG2E)
    # tanh(x) = 1 - 2 / (1 + exp(2x)): the chip's own tanh has only 11 bits.
    doubled = jnp.exp2(score * (2 * LOG2E * options.scale / options.soft_cap))
    return (1 - 2 / (1 + doubled)) * (options.soft_cap * LOG2E)


def _visible(start, position, last, options: AttendOptions):
    """Mask of the keys from `start` on that each query row sees; row r is token r // group."""
    shape, layout = (options.query_rows, BLOCK_TOKENS), options.layout
    # r // group >= m exactly if r >= m * group, which needs no division per element.
    row, key = _iota(0, shape, layout), start + _iota(1, shape, layout)
    sees = (row >= (key - position) * options.group) & (key <= last)
    if options.window is not None:
        sees &= row < (key - position + options.window) * options.group
    return sees


def _iota(axis: int, shape: tuple[int, ...], layout: Any):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def _along_rows(values_Q):
    return lax.broadcast_in_dim(values_Q, (values_Q.shape[0], LANES), (0,))


def _along_keys(values_S, options: AttendOptions):
    return lax.broadcast_in_dim(values_S, (options.query_rows, BLOCK_TOKENS), (1,))
