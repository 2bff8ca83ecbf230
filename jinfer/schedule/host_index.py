"""Keys of the pages in host memory. The engine holds their contents."""

from collections import OrderedDict
from collections.abc import Sequence

from jinfer.axes import PageId
from jinfer.schedule.plan import PageSave
from jinfer.schedule.prefix_cache import PageKey


class HostIndex:
    """Keys of evicted pages that the host keeps, least recently used first.

    A restored page stays here too, so evicting it again copies nothing. When host memory is full,
    the least recently used page is forgotten. The device evicts leaves first, so leaves are
    forgotten first here too.

    A plan collects moves, which happen before its step: saves, then restores, then forgets. One
    plan may save, restore and forget the same page. A page saved and forgotten by one plan, and
    not restored, is not copied.
    """

    def __init__(self, num_pages: int, min_restored: int) -> None:
        """Starts empty.

        Args:
          num_pages: pages that fit in host memory; 0 = no host tier.
          min_restored: fewer pages than this are faster to compute than to fetch.
        """
        self._num_pages = num_pages
        self._min_restored = min_restored
        self._keys: OrderedDict[PageKey, None] = OrderedDict()  # least recently used first
        self._saves: list[PageSave] = []
        self._forgotten: dict[PageKey, None] = {}
        self._restored: set[PageKey] = set()  # by the current plan

    def __len__(self) -> int:
        return len(self._keys)

    def save(self, page_id: PageId, key: PageKey) -> None:
        """Keeps a page that the device evicts."""
        if self._num_pages == 0:
            return
        if key in self._keys:
            self._keys.move_to_end(key)
            return
        if key in self._forgotten:  # by this plan: the host still has its content
            del self._forgotten[key]
        else:
            self._saves.append(PageSave(page_id, key))
        self._keys[key] = None
        if len(self._keys) > self._num_pages:
            oldest, _ = self._keys.popitem(last=False)
            self._forgotten[oldest] = None

    def find(self, keys: Sequence[PageKey]) -> list[PageKey]:
        """The leading keys that the host has; none if too few to be worth fetching."""
        num_found = next((i for i, key in enumerate(keys) if key not in self._keys), len(keys))
        return list(keys[:num_found]) if num_found >= max(1, self._min_restored) else []

    def restore(self, keys: Sequence[PageKey]) -> None:
        """Notes that a plan restores pages; the first of a prefix is kept longest."""
        self._restored.update(keys)
        for key in reversed(keys):
            self._keys.move_to_end(key)

    def take_moves(self) -> tuple[tuple[PageSave, ...], tuple[PageKey, ...]]:
        """Pages saved and keys forgotten since the last call."""
        in_vain = {save.key for save in self._saves if save.key in self._forgotten}
        in_vain -= self._restored
        saves = tuple(save for save in self._saves if save.key not in in_vain)
        forgotten = tuple(key for key in self._forgotten if key not in in_vain)
        self._saves.clear()
        self._forgotten.clear()
        self._restored.clear()
        return saves, forgotten

    def clear(self) -> None:
        """Forgets every page, including pages not saved yet."""
        self._forgotten.update(dict.fromkeys(self._keys))
        self._keys.clear()
