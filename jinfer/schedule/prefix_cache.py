"""Which pages hold which tokens, so that a prefix computed once is not computed again."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jinfer.axes import PageId
from jinfer.schedule.page_pool import PagePool

PageKey = bytes  # 16 bytes


def root_key(*parts: str) -> PageKey:
    """The key before a first page: keeps apart what must never be shared, such as tenants."""
    # Lengths first, so that no two lists of parts spell the same bytes.
    text = "\x00".join((*(str(len(part)) for part in parts), *parts))
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


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
    something else; the pool gives up the page released longest ago first.

    Invariant: the pages of one name are one idle page, or owned ones. Two sequences may have
    computed the same; whoever ends first then leaves nothing behind, and the other's page stays.

    So leaves go first: whoever owns a page owns pages of every name before it, and releases
    them after it. A prefix is therefore released, and given up, after all that hangs on it.
    """

    def __init__(
        self,
        pool: PagePool,
        on_evict: Callable[[PageId, PageKey], object] = lambda page_id, key: None,
    ) -> None:
        """Starts empty; `on_evict` hears of each page that the pool gives up."""
        self._pool = pool
        self._on_evict = on_evict
        self._pages_of: dict[PageKey, list[PageId]] = {}
        self._key_of: dict[PageId, PageKey] = {}
        pool.keeps = self._keeps
        pool.on_reuse = self._evict

    def __len__(self) -> int:
        return len(self._pages_of)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._pages_of

    def find(self, keys: Iterable[PageKey]) -> list[PageId]:
        """The pages of the longest known prefix. They are not yet shared."""
        page_ids = []
        for key in keys:
            pages = self._pages_of.get(key)
            if pages is None:
                break
            page_ids.append(pages[0])
        return page_ids

    def publish(self, key: PageKey, page_id: PageId) -> None:
        """Names an owned page, whose owner has named all pages before it."""
        if page_id in self._key_of:
            return
        pages = self._pages_of.setdefault(key, [])
        for twin in [page for page in pages if self._pool.is_idle(page)]:
            self._pool.drop(twin)
            pages.remove(twin)
            del self._key_of[twin]
        pages.append(page_id)
        self._key_of[page_id] = key

    def clear(self) -> None:
        """Forgets every name; pages without an owner become free."""
        for page_id in self._key_of:
            if self._pool.is_idle(page_id):
                self._pool.drop(page_id)
        self._key_of.clear()
        self._pages_of.clear()

    def _keeps(self, page_id: PageId) -> bool:
        key = self._key_of.get(page_id)
        if key is None:
            return False
        if len(self._pages_of[key]) == 1:
            return True
        self._forget(page_id)
        return False

    def _evict(self, page_id: PageId) -> None:
        self._on_evict(page_id, self._key_of[page_id])
        self._forget(page_id)

    def _forget(self, page_id: PageId) -> None:
        key = self._key_of.pop(page_id)
        self._pages_of[key].remove(page_id)
        if not self._pages_of[key]:
            del self._pages_of[key]
