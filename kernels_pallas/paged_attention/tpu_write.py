"""The TPU kernel that writes new keys and values into the pool, in place.

A DMA cannot address one row of a tiled array, so each item reads the slab of cells around
its new ones, puts them in, and writes the slab back: the tile's height in the pool's dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.tpu_work import Rows, WriteItems, write_items


def write_rows(
    k_TKH: Float[Array, "T K H"],
    v_TKH: Float[Array, "T K H"],
    pages_LPKZ2H: Float[Array, "L P K Z 2*H"],
    layer: int | Int32[Array, ""],
    page_table_BM: Int32[Array, "B M"],
    rows: Rows,
    *,
    interpret: Any,
) -> Float[Array, "L P K Z 2*H"]:
    """Puts each row's new tokens into its cells; tokens of no row are not written.

    Cost: per run of up to W new tokens, W cells of all kv heads read and written.
    """
    _, _, num_kv_heads, page_size, width = pages_LPKZ2H.shape
    tile_height = 32 // jnp.dtype(pages_LPKZ2H.dtype).itemsize
    slab = page_size if page_size % tile_height else tile_height
    items, num_used = write_items(rows, page_table_BM, page_size, slab, k_TKH.shape[0])
    # float32, because one head of a token is one sublane, and 16-bit ones come in pairs.
    new_TK2H = jnp.concatenate([k_TKH, v_TKH], axis=-1).astype(jnp.float32)

    def slab_of(i, layer_ref, num_ref, page_ref, slab_ref, *_):
        return layer_ref[0], page_ref[i], 0, slab_ref[i], 0

    slab_block = pl.BlockSpec((1, 1, num_kv_heads, slab, width), slab_of)
    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), num_used.reshape(1), *items)
    return pl.pallas_call(
        _write_kernel,
        out_shape=jax.ShapeDtypeStruct(pages_LPKZ2H.shape, pages_LPKZ2H.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            # Never 0: with nothing to write, item 0 gives back a slab of page 0 as it was.
            grid=(jnp.maximum(num_used, 1),),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), slab_block],
            out_specs=slab_block,
            scratch_shapes=[
                pltpu.VMEM((2, slab, num_kv_heads, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_pages",
    )(*scalars, new_TK2H, pages_LPKZ2H)


def _write_kernel(layer_ref, num_ref, *refs):
    del layer_ref  # only the block specs need it
    items, (new_hbm, old_ref, page_ref, new_buf, sems) = WriteItems(*refs[:5]), refs[5:]
    #       [T, K, 2H] [1, 1, K, W, 2H]   twice   [2, W, K, 2H]
    i = pl.program_id(0)
    first, count = items.first_X[i], items.count_X[i]

    def for_each_token(item, act):
        slot = item % 2

        def one_token(t, carry):
            source = new_hbm.at[items.token_X[item] + t]
            cell = new_buf.at[slot, items.first_X[item] + t]
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
    _, _, num_kv_heads, slab, width = page_ref.shape
    cell = lax.broadcasted_iota(jnp.int32, (slab, width), 0)
    fresh = (cell >= first) & (cell < first + count)
    for head in range(num_kv_heads):
        old = old_ref[0, 0, head].astype(jnp.float32)
        merged = jnp.where(fresh, new_buf[i % 2, :, head, :], old)
        page_ref[0, 0, head] = merged.astype(page_ref.dtype)
