"""Which pages of the KV pool are taken, and by how many."""

from collections import deque
from collections.abc import Iterable

from jinfer.axes import PageId


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that `num_tokens` tokens of one sequence fill, the last one perhaps in part."""
    return -(-num_tokens // page_size)


class PagePool:
    """Reference counts for physical pages. Counts pages, never tokens.

    Invariant: every page but 0 is either in `_free` with count 0, or out of it with count >= 1.
    Page 0 is the bin, where padding writes: it is never handed out.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 1, f"a pool has at least the bin page: {num_pages=}"
        self._free = deque(PageId(i) for i in range(1, num_pages))
        self._refs = [0] * num_pages

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def allocate(self, num_pages: int) -> list[PageId] | None:
        """Takes `num_pages` pages, or none at all and returns None.

        Running out is ordinary under load, so it is a value and not an exception; the
        scheduler answers it by preempting.
        """
        assert num_pages >= 0, f"allocated a negative count: {num_pages=}"
        if num_pages > len(self._free):
            return None
        page_ids = [self._free.popleft() for _ in range(num_pages)]
        for page_id in page_ids:
            self._refs[page_id] = 1
        return page_ids

    def share(self, page_ids: Iterable[PageId]) -> None:
        """Adds one owner to each page; every owner releases it once."""
        for page_id in page_ids:
            assert self._refs[page_id] > 0, f"shared a free page: {page_id=}"
            self._refs[page_id] += 1

    def release(self, page_ids: Iterable[PageId]) -> None:
        """Takes one owner from each page; a page without owners is free again."""
        for page_id in page_ids:
            assert self._refs[page_id] > 0, f"released a free page: {page_id=}"
            self._refs[page_id] -= 1
            if self._refs[page_id] == 0:
                self._free.append(page_id)
