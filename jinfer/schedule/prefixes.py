"""Finds the tokens of a sequence that another sequence has already computed."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from jinfer.axes import PageId
from jinfer.schedule.host_index import HostIndex
from jinfer.schedule.page_pool import PagePool
from jinfer.schedule.prefix_cache import PageKey, PrefixCache, page_key
from jinfer.schedule.sequence import TokenSequence

Coming = PageKey | tuple[int, bytes]  # a page's key, or a prompt's identity
_NEVER = sys.maxsize  # as num_published: publish no more pages


@dataclass(frozen=True, slots=True)
class Found:
    """The known prefix of a sequence: its first tokens that are already computed."""

    num_tokens: int = 0
    pages: list[PageId] = field(default_factory=list)  # full pages to share
    host_keys: list[PageKey] = field(default_factory=list)  # of the next pages, in host memory
    source: PageId | None = None  # the page after these, to copy; holds the rest of num_tokens


class Prefixes:
    """Finds the known prefix of each sequence, and publishes the pages that sequences compute.

    Full pages are found by key, on the device or in host memory. After them comes a partial page:
    a sequence with the same prompt as a running one, such as another completion of one request,
    copies its last prompt page and appends to the copy. So the prompt of n completions is computed
    once, except for its last token, whose logits each completion needs.

    A sequence that scores its prompt has no known prefix: it needs the logits of every position.
    """

    def __init__(self, pool: PagePool, host: HostIndex, *, page_size: int, enabled: bool) -> None:
        self.enabled = enabled
        self._page_size = page_size
        self._host = host
        self._cache = PrefixCache(pool, on_evict=host.save)

    def find(self, sequence: TokenSequence, running: Iterable[TokenSequence]) -> Found:
        """The longest known prefix. Shares no page yet."""
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
        """Prompts and full pages that `running` will compute and nobody can read yet."""
        names: set[Coming] = set()
        for sequence in running:
            if sequence.num_scheduled < sequence.num_prompt_tokens:
                names.add(_prompt_name(sequence))
            num_pages = sequence.num_prompt_tokens // self._page_size
            names.update(sequence.page_keys[sequence.num_published : num_pages])
        return names

    def is_coming(self, sequence: TokenSequence, found: Found, coming: set[Coming]) -> bool:
        """Whether another sequence is computing the first missing tokens: then wait for it.

        The wait ends: a running sequence computes its prompt, or is preempted.
        """
        if not self._reads(sequence):
            return False
        if found.num_tokens < sequence.num_prompt_tokens - 1 and _prompt_name(sequence) in coming:
            return True
        keys = self._readable_keys(sequence)
        place = found.num_tokens // self._page_size
        return place < len(keys) and keys[place] in coming

    def publish(self, sequence: TokenSequence, num_tokens: int) -> None:
        """Publishes the full pages of the first `num_tokens` tokens, whose values are known."""
        num_pages = num_tokens // self._page_size
        if not self.enabled or num_pages <= sequence.num_published:
            return
        keys = self._keys(sequence, num_pages)
        for index in range(sequence.num_published, num_pages):
            self._cache.publish(keys[index], sequence.pages[index])
        sequence.num_published = num_pages

    def forget(self, running: Iterable[TokenSequence]) -> None:
        """Empties the cache, also in host memory. Running sequences publish no more pages."""
        self._cache.clear()
        self._host.clear()
        for sequence in running:
            sequence.num_published = _NEVER

    def _reads(self, sequence: TokenSequence) -> bool:
        return self.enabled and not sequence.scores_prompt

    def _readable_keys(self, sequence: TokenSequence) -> list[PageKey]:
        # Always compute the last token: the next is sampled from its logits.
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
        """A running sequence's page with this prompt's tokens after `num_tokens`, if any."""
        last = sequence.num_prompt_tokens - 1
        if not num_tokens < last < num_tokens + self._page_size:
            return None
        for other in running:
            # An earlier plan must have scheduled all of its prompt: this plan is not counted yet.
            if other.num_scheduled > last and _prompt_name(sequence) == _prompt_name(other):
                return other.pages[last // self._page_size]
        return None


def _prompt_name(sequence: TokenSequence) -> tuple[int, bytes]:
    # All completions of a request hold the same list, so its id is enough.
    return id(sequence.prompt_ids), sequence.root_key
