"""Which pages hold which tokens, so that a prefix computed once is not computed again."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from jinfer.axes import PageId
from jinfer.schedule.page_pool import PagePool

PageKey = bytes  # 16 bytes


def root_key(*parts: str) -> PageKey:
    """The key before a first page: keeps apart what must never be shared, such as tenants."""
    # Lengths first, so that no two lists of parts spell the same bytes.
    text = "\x00".join((*(str(len(part)) for part in parts), *parts))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def page_key(parent: PageKey, token_ids: Sequence[int]) -> PageKey:
    """Names a full page by everything that determined the numbers stored in it.

    `parent` is the key of the page before, or a root key. Equal keys therefore mean equal tokens
    from the very start of the sequence.
    """
    payload = np.asarray(token_ids, dtype="<u4").tobytes()
    return hashlib.blake2b(parent + payload, digest_size=16).digest()


class PrefixCache:
    """Finds full pages by their content. The pool owns the pages; this only names them.

    A page is named once its K/V is computed, or certain to be by a step that runs before any that
    could read it. It keeps its name when its last owner releases it, until the pool needs it for
    something else; the pool gives up the page released longest ago first. Sequences release
    their last page first, so a prefix outlives what hangs on it.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[PageKey, PageId] = {}
        self._key_of: dict[PageId, PageKey] = {}
        pool.on_reuse = self._forget

    def __len__(self) -> int:
        return len(self._page_of)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._page_of

    def find(self, keys: Iterable[PageKey]) -> list[PageId]:
        """The pages of the longest known prefix. They are not yet shared."""
        page_ids = []
        for key in keys:
            page_id = self._page_of.get(key)
            if page_id is None:
                break
            page_ids.append(page_id)
        return page_ids

    def publish(self, key: PageKey, page_id: PageId) -> None:
        """Names a page. If another page holds the same already, that one stays the one."""
        if key in self._page_of or page_id in self._key_of:
            return
        self._page_of[key] = page_id
        self._key_of[page_id] = key
        self._pool.keep(page_id)

    def clear(self) -> None:
        """Forgets every name; pages without an owner become free."""
        for page_id in list(self._key_of):
            self._pool.unkeep(page_id)
            self._forget(page_id)

    def _forget(self, page_id: PageId) -> None:
        del self._page_of[self._key_of.pop(page_id)]
