"""Copies whole pages within the pool, out of it and back. Each program moves a fixed number.

The pool is any pytree of arrays whose second axis is the page. Padding moves the null page.
"""

from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Int32

PAGES_PER_MOVE = 8  # J: pages that one dispatch moves
# Groups of PAGES_PER_MOVE in flight per direction: each takes device memory beside the pool.
GROUPS_AT_ONCE = 4

_page = partial(lax.dynamic_index_in_dim, axis=1)
_set_page = partial(lax.dynamic_update_index_in_dim, axis=1)


def copy_pages(pages: Any, source_J: Int32[Array, "J"], page_J: Int32[Array, "J"]) -> Any:
    """Copies pages source_J to page_J, one after the other.

    Donates: `pages`. Recompiles: never.
    """

    # Page by page, so that the pool is updated in place and only one page is a temporary.
    def copy(j: Any, pages: Any) -> Any:
        return jax.tree.map(lambda a: _set_page(a, _page(a, source_J[j]), page_J[j]), pages)

    return lax.fori_loop(0, source_J.shape[0], copy, pages)


def gather_pages(pages: Any, page_J: Int32[Array, "J"]) -> tuple[Any, ...]:
    """The contents of pages page_J as separate arrays, so that each can be freed separately."""
    return tuple(
        jax.tree.map(lambda a, j=j: _page(a, page_J[j], keepdims=False), pages)
        for j in range(page_J.shape[0])
    )


def scatter_pages(pages: Any, page_J: Int32[Array, "J"], contents: tuple[Any, ...]) -> Any:
    """Writes contents, as returned by `gather_pages`, into pages page_J.

    Donates: `pages`. Recompiles: never.
    """
    for j, content in enumerate(contents):
        pages = jax.tree.map(lambda a, c, j=j: _set_page(a, c, page_J[j]), pages, content)
    return pages
