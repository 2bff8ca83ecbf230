"""Carries out the page moves of a plan, and owns the pages in host memory."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jinfer.axes import PageId
from jinfer.compile.names import COPY_PAGES, GATHER_PAGES, SCATTER_PAGES
from jinfer.parallel.sharding import Placement
from jinfer.schedule.plan import PageCopy, PageRestore, PageSave
from jinfer.schedule.prefix_cache import PageKey
from jinfer.step.page_moves import GROUPS_AT_ONCE, PAGES_PER_MOVE

Programs = dict[str, jax.stages.Compiled]


class PageMover:
    """Saves, restores and copies pages before a step, in the order of the plan.

    The device queues each program or transfer behind the steps that write its source, and before
    the steps that overwrite it. The host waits only if a plan moves more than `GROUPS_AT_ONCE`
    groups of pages. Host memory is pinned if the platform allows it, so that transfers overlap
    with compute.
    """

    def __init__(self, programs: Programs, placement: Placement) -> None:
        self._programs = programs
        self._stored: dict[PageKey, Any] = {}
        memories = placement.local_devices[0].addressable_memories()
        kinds = {memory.kind for memory in memories}
        host_kind = "pinned_host" if "pinned_host" in kinds else None
        self._on_host = placement.sharding("LK", memory_kind=host_kind)
        self._on_device = placement.sharding("LK")

    @property
    def num_stored(self) -> int:
        """Pages in host memory."""
        return len(self._stored)

    def apply(
        self,
        pages: Any,
        saves: Sequence[PageSave],
        restores: Sequence[PageRestore],
        forgotten: Sequence[PageKey],
        copies: Sequence[PageCopy],
    ) -> Any:
        """Carries out a plan's moves and returns the pool; consumes `pages` if any page changes."""
        self._save(pages, saves)
        pages = self._restore(pages, restores)
        for key in forgotten:
            del self._stored[key]
        return self._copy(pages, copies)

    def close(self) -> None:
        """Frees the host memory."""
        self._stored.clear()
        self._programs = {}

    def time_restore(self, pages: Any) -> tuple[Any, float]:
        """Returns the pool, and the seconds of one dispatch that restores pages from the host."""
        names = [str(j).encode() for j in range(PAGES_PER_MOVE)]
        null_page = PageId(0)
        self._save(pages, [PageSave(null_page, name) for name in names])
        jax.block_until_ready(self._stored)
        elapsed_s = math.inf
        for _ in range(3):
            start_s = time.perf_counter()
            pages = self._restore(pages, [PageRestore(name, null_page) for name in names])
            jax.block_until_ready(pages)
            elapsed_s = min(elapsed_s, time.perf_counter() - start_s)
        self._stored.clear()
        return pages, elapsed_s

    def _save(self, pages: Any, saves: Sequence[PageSave]) -> None:
        under_way: deque[Any] = deque()
        for group in _groups(saves):
            if len(under_way) == GROUPS_AT_ONCE:
                jax.block_until_ready(under_way.popleft())
            page_J = _padded([save.page_id for save in group])
            contents = self._programs[GATHER_PAGES](pages, page_J)[: len(group)]
            stored = jax.device_put(list(contents), self._on_host)
            self._stored.update(zip([save.key for save in group], stored, strict=True))
            under_way.append(stored)

    def _restore(self, pages: Any, restores: Sequence[PageRestore]) -> Any:
        for number, group in enumerate(_groups(restores)):
            if number and number % GROUPS_AT_ONCE == 0:
                jax.block_until_ready(pages)
            page_J = _padded([restore.page_id for restore in group])
            stored = [self._stored[restore.key] for restore in group]
            contents = jax.device_put(stored, self._on_device)
            contents += contents[:1] * (PAGES_PER_MOVE - len(group))  # null page
            pages = self._programs[SCATTER_PAGES](pages, page_J, tuple(contents))
        return pages

    def _copy(self, pages: Any, copies: Sequence[PageCopy]) -> Any:
        for group in _groups(copies):
            source_J = _padded([copy.source_id for copy in group])
            page_J = _padded([copy.page_id for copy in group])
            pages = self._programs[COPY_PAGES](pages, source_J, page_J)
        return pages


def _groups(moves: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(moves), PAGES_PER_MOVE):
        yield moves[start : start + PAGES_PER_MOVE]


def _padded(page_ids: Sequence[PageId]) -> np.ndarray:
    page_J = np.zeros(PAGES_PER_MOVE, np.int32)  # padded with the null page
    page_J[: len(page_ids)] = page_ids
    return page_J
