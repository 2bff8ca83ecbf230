"""What a sequence need not compute, because somebody else did."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from jinfer.axes import PageId
from jinfer.schedule.host_index import HostIndex
from jinfer.schedule.page_pool import PagePool
from jinfer.schedule.prefix_cache import PageKey, PrefixCache, page_key
from jinfer.schedule.sequence import TokenSequence

Coming = PageKey | tuple[int, bytes]  # a page's key, or a prompt's name
_NEVER = sys.maxsize  # more pages than a sequence has


@dataclass(frozen=True, slots=True)
class Found:
    """The first tokens of a sequence that somebody has computed."""

    num_tokens: int = 0
    pages: list[PageId] = field(default_factory=list)  # full ones, to be shared
    host_keys: list[PageKey] = field(default_factory=list)  # of those behind, in host memory
    source: PageId | None = None  # the page behind, full up to num_tokens: to be copied


class Prefixes:
    """Finds the known prefix of each sequence, and names what sequences compute.

    Full pages are found by name, on the device or in host memory. Behind them, a sequence with
    the very prompt of one that runs, as the continuations of one request have, gets a copy of
    its last, partial page: each writes on in its own. So a prompt of n continuations is computed
    once, but for its last token, whose logits each of them needs.

    A sequence that scores its prompt reads nothing here: it needs the logits of every position.
    """

    def __init__(self, pool: PagePool, host: HostIndex, *, page_size: int, enabled: bool) -> None:
        self.enabled = enabled
        self._page_size = page_size
        self._host = host
        self._cache = PrefixCache(pool, on_evict=host.save)

    def find(self, sequence: TokenSequence, running: Iterable[TokenSequence]) -> Found:
        """The longest known prefix. Nothing is shared yet."""
        if not self._reads(sequence):
            return Found()
        keys = self._readable_keys(sequence)
        pages = self._cache.find(keys)
        host_keys = self._host.find(keys[len(pages) :])
        num_tokens = (len(pages) + len(host_keys)) * self._page_size
        source = self._partial_page(sequence, num_tokens, running)
        if source is not None:
            num_tokens = sequence.num_prompt_tokens - 1
        return Found(num_tokens, pages, host_keys, source)

    def coming(self, running: Iterable[TokenSequence]) -> set[Coming]:
        """Names what these are computing and nobody can read yet: prompts, and full pages."""
        names: set[Coming] = set()
        for sequence in running:
            if sequence.num_scheduled < sequence.num_prompt_tokens:
                names.add(_prompt_name(sequence))
            num_pages = sequence.num_prompt_tokens // self._page_size
            names.update(sequence.page_keys[sequence.num_published : num_pages])
        return names

    def is_coming(self, sequence: TokenSequence, found: Found, coming: set[Coming]) -> bool:
        """Whether another is computing what this one lacks first: then it can wait.

        Not for ever: a sequence that runs computes its prompt, or is preempted.
        """
        if not self._reads(sequence):
            return False
        if found.num_tokens < sequence.num_prompt_tokens - 1 and _prompt_name(sequence) in coming:
            return True
        keys = self._readable_keys(sequence)
        place = found.num_tokens // self._page_size
        return place < len(keys) and keys[place] in coming

    def publish(self, sequence: TokenSequence, num_tokens: int) -> None:
        """Names the full pages among the first `num_tokens` tokens, all of them known."""
        num_pages = num_tokens // self._page_size
        if not self.enabled or num_pages <= sequence.num_published:
            return
        keys = self._keys(sequence, num_pages)
        for index in range(sequence.num_published, num_pages):
            self._cache.publish(keys[index], sequence.pages[index])
        sequence.num_published = num_pages

    def forget(self, running: Iterable[TokenSequence]) -> None:
        """Empties the cache, in host memory too; what runs goes on, and names nothing more."""
        self._cache.clear()
        self._host.clear()
        for sequence in running:
            sequence.num_published = _NEVER

    def _reads(self, sequence: TokenSequence) -> bool:
        return self.enabled and not sequence.scores_prompt

    def _readable_keys(self, sequence: TokenSequence) -> list[PageKey]:
        # The last token must be computed anyhow: the next is drawn from its logits.
        return self._keys(sequence, (sequence.num_tokens - 1) // self._page_size)

    def _keys(self, sequence: TokenSequence, num_pages: int) -> list[PageKey]:
        keys = sequence.page_keys
        while len(keys) < num_pages:
            start = len(keys) * self._page_size
            tokens = sequence.tokens(start, start + self._page_size)
            keys.append(page_key(keys[-1] if keys else sequence.root_key, tokens))
        return keys[:num_pages]

    def _partial_page(
        self, sequence: TokenSequence, num_tokens: int, running: Iterable[TokenSequence]
    ) -> PageId | None:
        """The page of a running sequence that holds this one's prompt up to its last token."""
        last = sequence.num_prompt_tokens - 1
        if not num_tokens < last < num_tokens + self._page_size:
            return None
        for other in running:
            # All of its prompt: what an earlier plan gave it, since this one does not count yet.
            if other.num_scheduled > last and _prompt_name(sequence) == _prompt_name(other):
                return other.pages[last // self._page_size]
        return None


def _prompt_name(sequence: TokenSequence) -> tuple[int, bytes]:
    # The continuations of a request have one list, so nothing need be compared.
    return id(sequence.prompt_ids), sequence.root_key
