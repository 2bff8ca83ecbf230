"""Copies pages from HBM to the TPU's attention kernel, one block of pages at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.paged_attention.pages import Pages, cells_of, scales_of
from kernels_pallas.paged_attention.tpu_work import AttendItems


class Stream(NamedTuple):
    """The pages that items see, in two buffers; used inside the kernel only.

    An item's blocks start at the first page that any of its queries sees, not at position 0:
    pages before the window are never read. An item without tokens has no blocks.
    """

    items: AttendItems
    layer: Any
    window: int | None
    table_hbm: Any  # [B, 1, M]
    pages_hbm: Pages  # [L, P, K, Z, 2H]
    table: Any  # [2, 1, M] in scalar memory: the lines of this item's row and the next item's
    pages: Pages  # [2, C, K, Z, 2H], scales [2, C, K, 2, Z]
    table_sems: Any
    page_sems: Any

    @property
    def page_size(self) -> int:
        return cells_of(self.pages).shape[3]

    @property
    def pages_per_block(self) -> int:
        return cells_of(self.pages).shape[1]

    def num_blocks(self, item: Any) -> Any:
        first_page, last_page = self._page_span(item)
        num_blocks = lax.div(last_page - first_page, self.pages_per_block) + 1
        return jnp.where(self.items.count_X[item] > 0, num_blocks, 0)

    def first_key(self, item: Any, j: Any) -> Any:
        """Position of the first key of the item's block j."""
        return self._first_page(item, j) * self.page_size

    def table_copy(self, item: Any) -> Any:
        """The copy of the page ids of the item's row; wait for it before `start`."""
        line = lax.rem(jnp.int32(item), 2)
        source = self.table_hbm.at[self.items.row_X[item]]
        return pltpu.make_async_copy(source, self.table.at[line], self.table_sems.at[line])

    def start(self, item: Any, j: Any, buffer: Any) -> None:
        line, first_page = lax.rem(jnp.int32(item), 2), self._first_page(item, j)

        def one_page(c, carry):
            page_id = self.table[line, 0, first_page + c]
            for copy in self._page_copies(page_id, buffer, c):
                copy.start()
            return carry

        lax.fori_loop(0, self._num_pages(item, j), one_page, 0)

    def wait(self, item: Any, j: Any, buffer: Any) -> None:
        def one_page(c, carry):
            # Any page id will do: waiting needs only the buffer and the size.
            for copy in self._page_copies(0, buffer, c):
                copy.wait()
            return carry

        lax.fori_loop(0, self._num_pages(item, j), one_page, 0)

    def clean(self, item: Any, j: Any, buffer: Any) -> None:
        """Zeroes the cells of a block that no query of the item sees.

        Masking the weights is not enough: such a cell may hold NaN, and 0 * NaN is NaN.
        """
        cells, scales = cells_of(self.pages), scales_of(self.pages)
        _, pages_per_block, num_kv_heads, page_size, _ = cells.shape
        first, last = self._span(item)
        first_key = self.first_key(item, j)

        def clean(ref, c, head, axis):
            values = ref[buffer, c, head]
            key = first_key + c * page_size + lax.broadcasted_iota(jnp.int32, values.shape, axis)
            kept = jnp.where((key >= first) & (key <= last), values.astype(jnp.float32), 0)
            ref[buffer, c, head] = kept.astype(values.dtype)

        def one_page(c, carry):
            for head in range(num_kv_heads):
                if scales is not None:
                    clean(scales, c, head, 1)
                if cells.dtype != jnp.int8:  # int8 cannot hold NaN
                    clean(cells, c, head, 0)
            return carry

        num_pages = self._num_pages(item, j)
        if self.window is not None:
            pl.when(j == 0)(lambda: one_page(0, None))
        whole = first_key + pages_per_block * page_size <= last + 1
        first_page = jnp.where(whole, pages_per_block, num_pages - 1)
        lax.fori_loop(first_page, pages_per_block, one_page, 0)

    def _span(self, item: Any) -> tuple[Any, Any]:
        """First and last position that any of the item's queries sees."""
        position = self.items.position_X[item]
        first = 0 if self.window is None else jnp.maximum(0, position - self.window + 1)
        return first, position + self.items.count_X[item] - 1

    def _page_span(self, item: Any) -> tuple[Any, Any]:
        first, last = self._span(item)
        page_size = self.page_size
        return lax.div(jnp.int32(first), page_size), lax.div(last, page_size)

    def _first_page(self, item: Any, j: Any) -> Any:
        return self._page_span(item)[0] + j * self.pages_per_block

    def _num_pages(self, item: Any, j: Any) -> Any:
        """The number of pages in the item's block j: C, or fewer in the last block."""
        left = self._page_span(item)[1] + 1 - self._first_page(item, j)
        return jnp.where(self.items.count_X[item] > 0, jnp.minimum(left, self.pages_per_block), 0)

    def _page_copies(self, page_id: Any, buffer: Any, c: Any) -> list[Any]:
        pairs = zip(jax.tree.leaves(self.pages_hbm), jax.tree.leaves(self.pages), strict=True)
        return [
            pltpu.make_async_copy(
                hbm.at[self.layer, page_id], vmem.at[buffer, c], self.page_sems.at[buffer]
            )
            for hbm, vmem in pairs
        ]
