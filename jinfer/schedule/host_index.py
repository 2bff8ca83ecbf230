"""Which pages lie in host memory, by name. Their content is the engine's."""

from collections import OrderedDict
from collections.abc import Sequence

from jinfer.axes import PageId
from jinfer.schedule.plan import PageSave
from jinfer.schedule.prefix_cache import PageKey


class HostIndex:
    """Names of pages that the device gave up and the host keeps, as many as it has room for.

    A page that comes back stays here too, so that giving it up once more moves nothing. What is
    used longest ago goes first, and pages are given up leaf first, so leaves go first here too.

    Moves are gathered while a plan is made and happen before its step: first pages are saved,
    then restored, then forgotten. So a page may be saved, restored and forgotten by one plan; but
    one that is saved only to be forgotten does not move.
    """

    def __init__(self, num_pages: int, min_restored: int) -> None:
        """Starts empty.

        Args:
          num_pages: room in host memory; 0 means that there is no host tier.
          min_restored: fewer pages than this are computed sooner than they are fetched.
        """
        self._num_pages = num_pages
        self._min_restored = min_restored
        self._keys: OrderedDict[PageKey, None] = OrderedDict()  # used longest ago first
        self._saves: list[PageSave] = []
        self._forgotten: dict[PageKey, None] = {}
        self._restored: set[PageKey] = set()  # by the plan in the making

    def __len__(self) -> int:
        return len(self._keys)

    def save(self, page_id: PageId, key: PageKey) -> None:
        """Keeps a page that the device gives up."""
        if self._num_pages == 0:
            return
        if key in self._keys:
            self._keys.move_to_end(key)
            return
        if key in self._forgotten:  # by this plan: its content is still there
            del self._forgotten[key]
        else:
            self._saves.append(PageSave(page_id, key))
        self._keys[key] = None
        if len(self._keys) > self._num_pages:
            oldest, _ = self._keys.popitem(last=False)
            self._forgotten[oldest] = None

    def find(self, keys: Sequence[PageKey]) -> list[PageKey]:
        """The first of the keys, as far as all of them are here and worth fetching."""
        num_found = next((i for i, key in enumerate(keys) if key not in self._keys), len(keys))
        return list(keys[:num_found]) if num_found >= max(1, self._min_restored) else []

    def restore(self, keys: Sequence[PageKey]) -> None:
        """Notes that a plan fetches pages; the first of a prefix outlives the rest."""
        self._restored.update(keys)
        for key in reversed(keys):
            self._keys.move_to_end(key)

    def take_moves(self) -> tuple[tuple[PageSave, ...], tuple[PageKey, ...]]:
        """What was saved and what was forgotten since the last call."""
        in_vain = {save.key for save in self._saves if save.key in self._forgotten}
        in_vain -= self._restored
        saves = tuple(save for save in self._saves if save.key not in in_vain)
        forgotten = tuple(key for key in self._forgotten if key not in in_vain)
        self._saves.clear()
        self._forgotten.clear()
        self._restored.clear()
        return saves, forgotten

    def clear(self) -> None:
        """Forgets every page, also those that are still to be saved."""
        self._forgotten.update(dict.fromkeys(self._keys))
        self._keys.clear()
