"""Finds pages by the tokens they hold, so that a prefix is computed only once."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jinfer.axes import PageId
from jinfer.schedule.page_pool import PagePool

PageKey = bytes  # 16 bytes


def root_key(*parts: str) -> PageKey:
    """The parent key of a first page. Different root keys, such as per tenant, share no pages."""
    # Lengths first, so that different parts never give the same bytes.
    text = "\x00".join((*(str(len(part)) for part in parts), *parts))
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def page_key(parent: PageKey, token_ids: Sequence[int]) -> PageKey:
    """Hashes a full page's tokens and the key of the page before it.

    `parent` is that key, or a root key. So equal keys mean equal tokens from the start of the
    sequence.
    """
    payload = np.asarray(token_ids, dtype="<u4").tobytes()
    return hashlib.blake2b(parent + payload, digest_size=16).digest()


class PrefixCache:
    """Finds full pages by key. The pool owns the pages; the cache only maps keys to them.

    A page is published once its K/V is computed, or will be by a step that runs before any reader.
    It keeps its key after its last owner releases it, until the pool reuses it. The pool reuses
    the page released longest ago first.

    Invariant: a key has either one idle page, or only owned pages. If two sequences computed the
    same page, the first to end frees its copy, and the other's copy stays.

    Leaves are evicted first: the owner of a page owns a page of every key before it, and releases
    those later. So a prefix is released, and evicted, after all pages that extend it.
    """

    def __init__(
        self,
        pool: PagePool,
        on_evict: Callable[[PageId, PageKey], object] = lambda page_id, key: None,
    ) -> None:
        """Starts empty; calls `on_evict` for each page that the pool reuses."""
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
        """The pages of the longest known prefix. Adds no owner."""
        page_ids = []
        for key in keys:
            pages = self._pages_of.get(key)
            if pages is None:
                break
            page_ids.append(pages[0])
        return page_ids

    def publish(self, key: PageKey, page_id: PageId) -> None:
        """Gives an owned page its key. Its owner has published all pages before it."""
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
        """Forgets every key; pages without an owner become free."""
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
