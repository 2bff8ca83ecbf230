"""Who runs in the next step: in which slot, on which pages, how many tokens."""

import heapq
from collections import deque
from dataclasses import dataclass, field, replace

from jinfer.axes import PageId, Slot
from jinfer.schedule.page_pool import PagePool, pages_for
from jinfer.schedule.plan import Chunk, PageWrite, StepPlan
from jinfer.schedule.prefix_cache import PrefixCache, page_key
from jinfer.schedule.sequence import Sequence, Status

# Steps of one dispatch while somebody waits: a slot or pages may come free at any of them.
STEPS_WHILE_WAITING = 4


class Scheduler:
    """Continuous batching with chunked prefill, first come first served.

    A plan serves, in this order: every decoding row, one token each; prefills that have begun,
    oldest first; then the waiting, strictly in order, while slots, tokens, readouts and pages
    last. A sequence whose next page is not to be had takes it from the youngest running one,
    perhaps itself: that one gives everything back and later computes its tokens again.

    Ownership: a sequence owns pages and a slot while it runs. They are taken in `plan`, and go
    back in `finish`, `abort`, or when it is preempted.

    Invariant: orders ascend through `_running` and on through `_waiting`. So the youngest
    running sequence is the last one, and its place when preempted is the head of the queue.

    With prefix caching a sequence starts with the pages that hold its first tokens already, if
    any, shared with whoever else has them. Nobody writes to them: they are full, and what a
    sequence computes goes behind them.

    The loop may plan step n+1 before it commits step n. Device work runs in order, so pages
    given back while a step in flight still writes to them may be handed out at once.
    """

    def __init__(
        self,
        *,
        max_slots: int,
        max_step_tokens: int,
        page_size: int,
        num_pages: int,
        max_model_len: int,
        max_readouts: int | None = None,
        max_chunk_tokens: int | None = None,
        prefix_caching: bool = False,
    ) -> None:
        """Starts empty.

        Args:
          max_slots: sequences that run at the same time.
          max_step_tokens: tokens of one step, at least `max_slots`.
          page_size: tokens per page.
          num_pages: pages in the pool, the bin included; one longest sequence must fit.
          max_model_len: tokens of the longest sequence, prompt and output.
          max_readouts: places of one step that may want logits, at least `max_slots`; None is
            just that. More lets prompts that are scored come in larger chunks.
          max_chunk_tokens: tokens of one chunk; None means as many as the step holds.
          prefix_caching: full pages are kept for sequences that begin with the same tokens.
        """
        max_readouts = max_slots if max_readouts is None else max_readouts
        # Every running row can then decode in every step, and the oldest can always grow.
        assert max_step_tokens >= max_slots >= 1, f"{max_step_tokens=}, {max_slots=}"
        assert max_readouts >= max_slots, f"{max_readouts=}, {max_slots=}"
        assert num_pages - 1 >= pages_for(max_model_len, page_size), f"{num_pages=}"
        assert max_chunk_tokens is None or max_chunk_tokens >= 1, f"{max_chunk_tokens=}"
        self._max_step_tokens = max_step_tokens
        self._max_chunk_tokens = max_chunk_tokens or max_step_tokens
        self._max_readouts = max_readouts
        self._max_model_len = max_model_len
        self._page_size = page_size
        self._pool = PagePool(num_pages)
        self._cache = PrefixCache(self._pool) if prefix_caching else None
        self._free_slots = [Slot(i) for i in range(max_slots)]  # a heap: the lowest goes first
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._preempted: list[Sequence] = []  # and not yet told in a plan
        self._num_arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free_pages

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence behind all others. Its lengths were checked at admission."""
        assert sequence.order == -1, f"added twice: {sequence.request_id=}"
        assert 1 <= sequence.num_tokens < sequence.max_length <= self._max_model_len, (
            f"{sequence.num_tokens=}, {sequence.max_length=}, {self._max_model_len=}"
        )
        sequence.order = self._num_arrivals
        self._num_arrivals += 1
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence: it gives back what it owns. Steps in flight for it count no more."""
        assert sequence.order >= 0, f"never added: {sequence.request_id=}"
        assert sequence.status is not Status.FINISHED, f"finished twice: {sequence.request_id=}"
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            self._give_back(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def abort(self, sequence: Sequence) -> None:
        """Like `finish`, but a sequence that has finished may be aborted: nothing happens."""
        if sequence.status is not Status.FINISHED:
            self.finish(sequence)

    def plan(self, max_steps: int = 1) -> StepPlan | None:
        """Decides the next dispatch and takes its pages and slots; None if nothing can run.

        With nothing in flight, None means that there is no work.

        Args:
          max_steps: where every row decodes, the dispatch may take up to so many steps.
        """
        draft = _Draft(self._max_step_tokens, self._max_readouts)
        num_untold = len(self._preempted)
        self._schedule_running(draft)
        # What was just taken from one is not for another that came later.
        if len(self._preempted) == num_untold:
            self._admit_waiting(draft)
        if not draft.chunks:
            in_flight = any(s.num_in_flight for s in (*self._running, *self._waiting))
            assert in_flight or not self.has_work, (
                f"stuck: {self.num_running=}, {self.num_waiting=}"
            )
            return None
        if max_steps > 1:
            most = STEPS_WHILE_WAITING if self._waiting else max_steps
            self._prolong(draft, min(max_steps, most))
        for sequence, chunk in draft.chunks.items():
            sequence.num_scheduled += chunk.num_tokens + chunk.num_steps - 1
            sequence.num_unread += chunk.samples * chunk.num_steps
            sequence.num_in_flight += chunk.num_steps
            # A prompt's pages will hold what they are named for before any later step reads them.
            self._publish(sequence, min(chunk.stop, sequence.num_prompt_tokens))
        # One that lost its place in a plan of None may be back by now, or have ended.
        preempted = tuple(s for s in self._preempted if s.status is Status.WAITING)
        self._preempted.clear()
        return draft.seal(preempted)

    def _prolong(self, draft: "_Draft", max_steps: int) -> None:
        """Lets a draft in which every row decodes go on for more steps, as far as pages are free.

        No one is preempted for it: a step too few costs a dispatch, not somebody's work.
        """
        chunks = draft.chunks.values()
        if any(c.num_tokens > 1 or c.num_readouts > 1 or not c.samples for c in chunks):
            return
        while max_steps > 1:
            longer = [
                replace(c, num_steps=min(max_steps, c.sequence.max_length - c.sequence.length))
                for c in chunks
            ]
            missing = [self._num_missing_pages(c) for c in longer]
            page_ids = self._pool.allocate(sum(missing))
            if page_ids is not None:
                break
            max_steps //= 2
        else:
            return
        for chunk, num_missing in zip(longer, missing, strict=True):
            draft.chunks[chunk.sequence] = chunk
            taken, page_ids = page_ids[:num_missing], page_ids[num_missing:]
            self._enter_pages(chunk, taken, draft)

    def _num_missing_pages(self, chunk: Chunk) -> int:
        num_tokens = chunk.stop + chunk.num_steps - 1
        return pages_for(num_tokens, self._page_size) - len(chunk.sequence.pages)

    def commit(self, chunk: Chunk, token_id: int | None) -> None:
        """Records that a chunk was computed and its token read; in the order of the plans.

        Args:
          chunk: of a plan; each is committed once.
          token_id: the token drawn, or None if the chunk does not sample.
        """
        assert chunk.samples == (token_id is not None), f"{chunk.samples=}, {token_id=}"
        sequence = chunk.sequence
        if sequence.status is Status.FINISHED:  # it ended while this was in flight
            return
        sequence.num_in_flight -= 1
        sequence.num_scored += len(chunk.scored_positions)
        if token_id is not None:
            sequence.num_unread -= 1
            sequence.output_ids.append(token_id)
        if sequence.status is Status.RUNNING:  # else preempted since: the token holds, its K/V not
            sequence.num_computed += chunk.num_tokens
            self._publish(sequence, sequence.num_computed)

    def forget_prefixes(self) -> None:
        """Empties the prefix cache; what runs goes on."""
        if self._cache is not None:
            self._cache.clear()

    def _schedule_running(self, draft: "_Draft") -> None:
        decodes = [s for s in self._running if s.num_unscheduled == 1]
        prefills = [s for s in self._running if s.num_unscheduled > 1]
        num_rows_after = len(decodes) + len(prefills)
        for sequence in decodes + prefills:
            num_rows_after -= 1
            # A row before may have preempted this one, or left no token for it.
            if sequence.status is Status.RUNNING and draft.num_tokens_left:
                # One readout stays reserved for every row that follows.
                self._schedule(sequence, draft.num_readouts_left - num_rows_after, draft)

    def _admit_waiting(self, draft: "_Draft") -> None:
        if not (self._waiting and self._free_slots):  # most steps of a long answer
            return
        num_spare_pages = self.num_free_pages - sum(map(self._num_pages_owed, self._running))
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            # A preempted one waits for its tokens in flight: it must compute them again.
            if sequence.num_in_flight or not (draft.num_tokens_left and draft.num_readouts_left):
                break
            cached = self._cached_pages(sequence)
            if self._is_coming(sequence, len(cached)):
                break
            num_pages = pages_for(sequence.num_tokens, self._page_size)
            # One page to grow into, but never more than it can ever fill.
            num_wanted = min(num_pages + 1, pages_for(sequence.max_length, self._page_size))
            num_idle = self._pool.num_idle(cached)
            if num_wanted - len(cached) + num_idle > num_spare_pages:
                break
            self._waiting.popleft()
            self._admit(sequence, cached, draft)
            num_spare_pages -= num_idle + self._num_pages_owed(sequence)
            self._schedule(sequence, draft.num_readouts_left, draft)

    def _admit(self, sequence: Sequence, cached: list[PageId], draft: "_Draft") -> None:
        self._running.append(sequence)
        sequence.status = Status.RUNNING
        sequence.slot = heapq.heappop(self._free_slots)
        draft.admitted.append(sequence)
        self._pool.share(cached)
        sequence.pages += cached  # entered in the page table when the slot's row is written
        sequence.num_published = len(cached)
        sequence.num_computed = sequence.num_scheduled = len(cached) * self._page_size
        if not sequence.num_preemptions:
            sequence.num_cached = sequence.num_computed

    def _cached_pages(self, sequence: Sequence) -> list[PageId]:
        """Pages that hold a prefix of the sequence; its last token must be computed anyhow."""
        # One that scores its prompt needs the logits of every position.
        if self._cache is None or sequence.scores_prompt:
            return []
        keys = self._keys(sequence, (sequence.num_tokens - 1) // self._page_size)
        return self._cache.find(keys)

    def _is_coming(self, sequence: Sequence, num_cached: int) -> bool:
        """Whether another is computing the page that this one lacks first: then it can wait.

        Not for ever: a sequence that runs computes its prompt, or is preempted behind this one.
        """
        if self._cache is None or sequence.scores_prompt:
            return False
        keys = self._keys(sequence, (sequence.num_tokens - 1) // self._page_size)
        if num_cached == len(keys):
            return False
        return any(
            num_cached < len(other.page_keys)
            and other.num_published <= num_cached < other.num_prompt_tokens // self._page_size
            and other.page_keys[num_cached] == keys[num_cached]
            for other in self._running
        )

    def _publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Names the full pages among the first `num_tokens` tokens, all of them known."""
        num_pages = num_tokens // self._page_size
        if self._cache is None or num_pages <= sequence.num_published:
            return
        keys = self._keys(sequence, num_pages)
        for index in range(sequence.num_published, num_pages):
            self._cache.publish(keys[index], sequence.pages[index])
        sequence.num_published = num_pages

    def _keys(self, sequence: Sequence, num_pages: int) -> list[bytes]:
        keys = sequence.page_keys
        while len(keys) < num_pages:
            start = len(keys) * self._page_size
            tokens = sequence.tokens(start, start + self._page_size)
            keys.append(page_key(keys[-1] if keys else sequence.root_key, tokens))
        return keys[:num_pages]

    def _num_pages_owed(self, sequence: Sequence) -> int:
        # Pages for the tokens it has and the one that comes next, as far as not yet taken.
        num_tokens = min(sequence.length + 1, sequence.max_length)
        return pages_for(num_tokens, self._page_size) - len(sequence.pages)

    def _schedule(self, sequence: Sequence, num_readouts_left: int, draft: "_Draft") -> None:
        chunk = self._cut_chunk(sequence, draft.num_tokens_left, num_readouts_left)
        page_ids = self._take_pages(sequence, self._num_missing_pages(chunk), draft)
        if page_ids is None:
            return
        self._enter_pages(chunk, page_ids, draft)
        draft.add(chunk)

    def _enter_pages(self, chunk: Chunk, page_ids: list[PageId], draft: "_Draft") -> None:
        pages = chunk.sequence.pages
        for page_id in page_ids:
            draft.page_writes.append(PageWrite(chunk.slot, len(pages), page_id))
            pages.append(page_id)

    def _cut_chunk(self, sequence: Sequence, num_tokens_left: int, num_readouts_left: int) -> Chunk:
        assert sequence.slot is not None, f"runs without a slot: {sequence.request_id=}"
        start = sequence.num_scheduled
        num_tokens = min(sequence.num_unscheduled, num_tokens_left, self._max_chunk_tokens)
        stop = start + num_tokens
        num_scores = 0
        if sequence.scores_prompt:
            first = max(start, sequence.num_scored)
            num_scores = max(0, min(stop, sequence.num_prompt_tokens - 1) - first)
            if num_scores + (stop == sequence.length) > num_readouts_left:
                stop = first + num_readouts_left
                num_scores = num_readouts_left
        assert stop > start, f"nothing to compute: {sequence.request_id=}, {start=}, {stop=}"
        samples = stop == sequence.length
        return Chunk(
            sequence, sequence.slot, start, stop - start, samples, num_readouts=num_scores + samples
        )

    def _take_pages(
        self, sequence: Sequence, num_pages: int, draft: "_Draft"
    ) -> list[PageId] | None:
        """Takes pages, from the youngest if need be; None if that was the sequence itself."""
        while (page_ids := self._pool.allocate(num_pages)) is None:
            if self._preempt_youngest(draft) is sequence:
                return None
        return page_ids

    def _preempt_youngest(self, draft: "_Draft") -> Sequence:
        sequence = self._running.pop()
        draft.drop(sequence)
        self._give_back(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = sequence.num_scheduled = 0
        sequence.num_preemptions += 1
        self._waiting.appendleft(sequence)
        self._preempted.append(sequence)
        return sequence

    def _give_back(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, f"runs without a slot: {sequence.request_id=}"
        self._pool.release(reversed(sequence.pages))
        sequence.pages.clear()
        sequence.num_published = 0
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = None


@dataclass(slots=True)
class _Draft:
    """A plan in the making, and what is left of the step's budgets."""

    num_tokens_left: int
    num_readouts_left: int
    chunks: dict[Sequence, Chunk] = field(default_factory=dict)
    admitted: list[Sequence] = field(default_factory=list)
    page_writes: list[PageWrite] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.chunks[chunk.sequence] = chunk
        self.num_tokens_left -= chunk.num_tokens
        self.num_readouts_left -= chunk.num_readouts

    def drop(self, sequence: Sequence) -> None:
        """Takes out a sequence about to lose its slot. What it was given stays spent."""
        if self.chunks.pop(sequence, None) is not None:
            self.page_writes = [w for w in self.page_writes if w.slot != sequence.slot]

    def seal(self, preempted: tuple[Sequence, ...]) -> StepPlan:
        chunks = tuple(self.chunks.values())
        return StepPlan(
            chunks=chunks,
            admitted=tuple(self.admitted),
            page_writes=tuple(self.page_writes),
            preempted=preempted,
            num_tokens=sum(chunk.num_tokens for chunk in chunks),
            num_readouts=sum(chunk.num_readouts for chunk in chunks),
        )
