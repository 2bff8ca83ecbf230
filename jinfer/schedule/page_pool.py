"""Free pages of the KV pool, and the number of owners of the others."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from jinfer.axes import PageId


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages for `num_tokens` tokens of one sequence; the last may be partial."""
    return -(-num_tokens // page_size)


class PagePool:
    """Reference counts of pages. Counts pages, never tokens.

    Invariant: every page but 0 has a count >= 1, or is in `_free`, or is in `_idle`. An idle page
    has no owner; it is kept for its content until no other page is free. Page 0 is the null page,
    where padding writes; it is never allocated.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 1, f"a pool has at least the null page: {num_pages=}"
        self._free = deque(PageId(i) for i in range(1, num_pages))
        self._idle: OrderedDict[PageId, None] = OrderedDict()  # released longest ago first
        self._refs = [0] * num_pages
        # Whether to keep the content of a page that lost its last owner.
        self.keeps: Callable[[PageId], bool] = lambda page_id: False
        self.on_reuse: Callable[[PageId], object] = lambda page_id: None  # of an idle page

    @property
    def num_free_pages(self) -> int:
        """Pages without an owner, idle ones included."""
        return len(self._free) + len(self._idle)

    def is_idle(self, page_id: PageId) -> bool:
        """Whether a page has no owner and is kept for its content."""
        return page_id in self._idle

    def num_idle(self, page_ids: Iterable[PageId]) -> int:
        """How many of these pages count as free until they are shared."""
        return sum(map(self.is_idle, page_ids))

    def allocate(self, num_pages: int) -> list[PageId] | None:
        """Takes `num_pages` pages; takes none and returns None if fewer are free.

        Running out is normal under load, so it is a value, not an exception; the scheduler then
        preempts.
        """
        assert num_pages >= 0, f"allocated a negative count: {num_pages=}"
        if num_pages > self.num_free_pages:
            return None
        page_ids = [self._take_one() for _ in range(num_pages)]
        for page_id in page_ids:
            self._refs[page_id] = 1
        return page_ids

    def share(self, page_ids: Iterable[PageId]) -> None:
        """Adds one owner to each page; every owner releases it once."""
        for page_id in page_ids:
            if self._refs[page_id] == 0:
                assert page_id in self._idle, f"shared a free page: {page_id=}"
                del self._idle[page_id]
            self._refs[page_id] += 1

    def release(self, page_ids: Iterable[PageId]) -> None:
        """Removes one owner from each page; a page without owners becomes free or idle."""
        for page_id in page_ids:
            assert self._refs[page_id] > 0, f"released a free page: {page_id=}"
            self._refs[page_id] -= 1
            if self._refs[page_id]:
                continue
            if self.keeps(page_id):
                self._idle[page_id] = None
            else:
                self._free.append(page_id)

    def drop(self, page_id: PageId) -> None:
        """Frees an idle page."""
        del self._idle[page_id]
        self._free.append(page_id)

    def _take_one(self) -> PageId:
        if self._free:
            return self._free.popleft()
        page_id, _ = self._idle.popitem(last=False)
        self.on_reuse(page_id)
        return page_id
