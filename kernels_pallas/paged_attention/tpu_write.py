"""The TPU kernel that writes new keys and values into the pool, in place.

A DMA cannot address one row of a tiled array. So each item reads the slab of cells around its
new ones, inserts them, and writes the slab back. A slab has a tile's height in the pool's dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.pages import (
    Pages,
    QuantizedPages,
    cells_of,
    new_cells,
)
from kernels_pallas.paged_attention.tpu_work import Rows, WriteItems, write_items


def write_rows(
    k_TKH: Float[Array, "T K H"],
    v_TKH: Float[Array, "T K H"],
    pages: Pages,
    layer: int | Int32[Array, ""],
    page_table_BM: Int32[Array, "B M"],
    rows: Rows,
    *,
    interpret: Any,
) -> Pages:
    """Writes each row's new tokens into its cells; tokens of no row are not written.

    Cost: per run of up to W new tokens, reads and writes W cells of all kv heads, and the scales of
    one page, if any.
    """
    cells = cells_of(pages)
    _, _, num_kv_heads, page_size, width = cells.shape
    tile_height = 32 // jnp.dtype(cells.dtype).itemsize
    slab = page_size if page_size % tile_height else tile_height
    items, num_used = write_items(rows, page_table_BM, page_size, slab, k_TKH.shape[0])
    new_TK2H, new_scales_TK2 = new_cells(k_TKH, v_TKH, pages)
    # float32, because one head of a token is one sublane; narrower dtypes pack several into one.
    new = [new_TK2H.astype(jnp.float32)]
    new_specs = [pl.BlockSpec(memory_space=pl.ANY)]
    if new_scales_TK2 is not None:
        new.append(_in_pages(new_scales_TK2, items, page_size, slab))
        per_item = pl.BlockSpec((1, *new[1].shape[1:]), lambda i, *_: (i, 0, 0, 0))
        new_specs.append(per_item)

    def slab_of(i, layer_ref, num_ref, page_ref, slab_ref, *_):
        return layer_ref[0], page_ref[i], 0, slab_ref[i], 0

    def page_of(i, layer_ref, num_ref, page_ref, *_):
        return layer_ref[0], page_ref[i], 0, 0, 0

    page_specs = [pl.BlockSpec((1, 1, num_kv_heads, slab, width), slab_of)]
    if isinstance(pages, QuantizedPages):
        page_specs.append(pl.BlockSpec((1, 1, num_kv_heads, 2, page_size), page_of))
    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), num_used.reshape(1), *items)
    leaves, structure = jax.tree.flatten(pages)
    first_leaf = len(scalars) + len(new)
    (leaves,) = pl.pallas_call(
        _write_kernel,
        out_shape=([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves],),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            # At least 1: without work, item 0 writes a slab of the null page back unchanged.
            grid=(jnp.maximum(num_used, 1),),
            in_specs=[new_specs, page_specs],
            out_specs=(page_specs,),
            scratch_shapes=[
                pltpu.VMEM((2, slab, num_kv_heads, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={first_leaf + i: i for i in range(len(leaves))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_pages",
    )(*scalars, new, leaves)
    return jax.tree.unflatten(structure, leaves)


def _in_pages(
    scales_TK2: Float[Array, "T K 2"], items: WriteItems, page_size: int, slab: int
) -> Float[Array, "X K 2 Z"]:
    """Each item's new scales at their offsets in its page; garbage at other offsets."""
    cell = jnp.arange(page_size, dtype=jnp.int32)
    begin_X = items.slab_X * slab + items.first_X
    token_XZ = items.token_X[:, None] + cell - begin_X[:, None]
    scales_XZK2 = scales_TK2[jnp.clip(token_XZ, 0, len(scales_TK2) - 1)]
    return jnp.moveaxis(scales_XZK2, 1, 3)


def _write_kernel(layer_ref, num_ref, *refs):
    del layer_ref  # only the block specs need it
    items, (new_refs, old_refs, page_refs, new_buf, sems) = WriteItems(*refs[:5]), refs[5:]
    #       [T, K, 2H], perhaps [1, K, 2, Z]      twice [1, 1, K, W, 2H], perhaps [1, 1, K, 2, Z]
    i = pl.program_id(0)

    def for_each_token(item, act):
        slot = item % 2

        def one_token(t, carry):
            source = new_refs[0].at[items.token_X[item] + t]
            cell = new_buf.at[slot, items.first_X[item] + t]  # [2, W, K, 2H]
            act(pltpu.make_async_copy(source, cell, sems.at[slot]))
            return carry

        lax.fori_loop(0, items.count_X[item], one_token, 0)

    @pl.when(i == 0)
    def _():
        for_each_token(0, lambda copy: copy.start())

    @pl.when(i + 1 < num_ref[0])
    def _():
        for_each_token(i + 1, lambda copy: copy.start())

    for_each_token(i, lambda copy: copy.wait())
    first, count = items.first_X[i], items.count_X[i]
    _, _, num_kv_heads, slab, width = page_refs[0].shape
    cell = lax.broadcasted_iota(jnp.int32, (slab, width), 0)
    fresh = (cell >= first) & (cell < first + count)
    for head in range(num_kv_heads):
        old = old_refs[0][0, 0, head].astype(jnp.float32)
        merged = jnp.where(fresh, new_buf[i % 2, :, head, :], old)
        page_refs[0][0, 0, head] = merged.astype(page_refs[0].dtype)
    if len(page_refs) == 1:
        return
    _, _, _, _, page_size = page_refs[1].shape
    cell = lax.broadcasted_iota(jnp.int32, (2, page_size), 1) - items.slab_X[i] * slab
    fresh = (cell >= first) & (cell < first + count)
    # A page's scales stay in this block while its slabs pass: they hold the slab before's scales.
    again = (i > 0) & (items.page_X[i] == items.page_X[jnp.maximum(i - 1, 0)])
    for head in range(num_kv_heads):
        old = jnp.where(again, page_refs[1][0, 0, head], old_refs[1][0, 0, head])
        page_refs[1][0, 0, head] = jnp.where(fresh, new_refs[1][0, head], old)
