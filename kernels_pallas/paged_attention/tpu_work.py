"""Work lists of the TPU kernels: computed in XLA from the rows, read from scalar memory.

A list has a fixed number of entries; the first `num_used` are real. The grid has `num_used`
steps, so the other entries cost nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32


class Rows(NamedTuple):
    kv_len_B: Int32[Array, "B"]
    query_start_B: Int32[Array, "B"]
    query_len_B: Int32[Array, "B"]


class WriteItems(NamedTuple):
    """Runs of new tokens, each within one slab of W cells of one page."""

    page_X: Int32[Array, "X"]
    slab_X: Int32[Array, "X"]  # the slab's index in the page
    first_X: Int32[Array, "X"]  # first cell to write, an index into the slab
    count_X: Int32[Array, "X"]  # 0 in an unused item, which has the null page
    token_X: Int32[Array, "X"]  # token for that cell, an index into T


class AttendItems(NamedTuple):
    """Runs of one row's query tokens, each within one block of U tokens; blocks ascend."""

    block_X: Int32[Array, "X"]
    row_X: Int32[Array, "X"]
    first_X: Int32[Array, "X"]  # the run's first token, an index into the block
    count_X: Int32[Array, "X"]  # 0 in an unused item
    position_X: Int32[Array, "X"]  # of the first token in its own sequence


def write_items(
    rows: Rows, page_table_BM: Int32[Array, "B M"], page_size: int, slab: int, num_tokens: int
) -> tuple[WriteItems, Int32[Array, ""]]:
    """Cuts every row's new tokens at slab boundaries of their positions."""
    kv_len_B, start_B, query_len_B = rows
    # A run of n tokens touches at most n slabs and at most (n - 1) // slab + 2 slabs.
    num_items = max(1, min(num_tokens, num_tokens // slab + 2 * len(kv_len_B)))
    old_B = kv_len_B - query_len_B
    count_B = jnp.where(query_len_B > 0, (kv_len_B - 1) // slab + 1 - old_B // slab, 0)
    row_X, nth_X, num_used = _deal(count_B, num_items)
    cell_X = ((old_B // slab)[row_X] + nth_X) * slab  # the slab's first position
    begin_X = jnp.maximum(cell_X, old_B[row_X])
    end_X = jnp.minimum(cell_X + slab, kv_len_B[row_X])
    live_X = jnp.arange(num_items, dtype=jnp.int32) < num_used
    last_page = page_table_BM.shape[1] - 1
    page_X = page_table_BM[row_X, jnp.clip(cell_X // page_size, 0, last_page)]
    items = WriteItems(
        page_X=jnp.where(live_X, page_X, 0),
        slab_X=jnp.where(live_X, cell_X % page_size // slab, 0),
        first_X=begin_X - cell_X,
        count_X=jnp.where(live_X, end_X - begin_X, 0),
        token_X=start_B[row_X] + begin_X - old_B[row_X],
    )
    return items, num_used


def attend_items(
    rows: Rows, tile_tokens: int, num_tokens: int
) -> tuple[AttendItems, Int32[Array, ""]]:
    """Cuts every row's query tokens at multiples of `tile_tokens` packed tokens."""
    # Ascending blocks keep a shared block's output in VMEM until its last row has written.
    order_B = jnp.argsort(rows.query_start_B).astype(jnp.int32)
    kv_len_B, start_B, query_len_B = (values_B[order_B] for values_B in rows)
    num_blocks, num_rows = -(-num_tokens // tile_tokens), len(order_B)
    num_items = max(1, min(num_tokens, num_blocks + num_rows))
    end_B = start_B + query_len_B
    first_block_B = start_B // tile_tokens
    count_B = jnp.where(query_len_B > 0, (end_B - 1) // tile_tokens + 1 - first_block_B, 0)
    turn_X, nth_X, num_used = _deal(count_B, num_items)
    live_X = jnp.arange(num_items, dtype=jnp.int32) < num_used
    block_X = jnp.where(live_X, first_block_B[turn_X] + nth_X, 0)
    begin_X = jnp.maximum(block_X * tile_tokens, start_B[turn_X])
    until_X = jnp.minimum((block_X + 1) * tile_tokens, end_B[turn_X])
    items = AttendItems(
        block_X=block_X,
        row_X=order_B[turn_X],
        first_X=begin_X - block_X * tile_tokens,
        count_X=jnp.where(live_X, until_X - begin_X, 0),
        position_X=(kv_len_B - end_B)[turn_X] + begin_X,
    )
    return items, num_used


def _deal(
    count_B: Int32[Array, "B"], num_items: int
) -> tuple[Int32[Array, "X"], Int32[Array, "X"], Int32[Array, ""]]:
    """Gives each row `count` items: each item's row, its index in the row, and the total."""
    end_B = jnp.cumsum(count_B, dtype=jnp.int32)
    item_X = jnp.arange(num_items, dtype=jnp.int32)
    row_X = jnp.searchsorted(end_B, item_X, side="right", method="compare_all")
    row_X = jnp.minimum(row_X, len(count_B) - 1).astype(jnp.int32)
    return row_X, item_X - (end_B - count_B)[row_X], end_B[-1]
