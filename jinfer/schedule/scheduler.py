"""Decides which sequences run in the next step: their slots, pages and numbers of tokens."""

import heapq
import math
from bisect import insort
from dataclasses import replace

from jinfer.axes import PageId, Slot
from jinfer.schedule.host_index import HostIndex
from jinfer.schedule.pace import Awaited, Pace
from jinfer.schedule.page_pool import PagePool, pages_for
from jinfer.schedule.plan import Chunk, PageCopy, PageRestore, PageWrite, StepPlan
from jinfer.schedule.plan_builder import PlanBuilder
from jinfer.schedule.prefixes import Coming, Found, Prefixes
from jinfer.schedule.sequence import Status, TokenSequence
from jinfer.schedule.waiting import WaitingQueue

# Most steps of one dispatch while a sequence waits: each step may free a slot or pages.
STEPS_WHILE_WAITING = 4
# Waiting sequences compared for the longest known prefix.
CANDIDATES = 16
# At most this many later sequences may start before the oldest waiting one.
MAX_OVERTAKEN = 64


class Scheduler:
    """Continuous batching with chunked prefill, by priority and then first come first served.

    A plan serves, in this order: decoding rows, one token each; prefills that have begun; waiting
    sequences, while slots, tokens, rows of logits and pages last. When no page is free, the
    running sequence of the last rank is preempted: it gives back its slot and pages. Later it
    computes again the tokens that are not in the prefix cache.

    Ownership: a sequence owns pages and a slot while it runs. `plan` takes them; `finish`,
    `abort` and preemption give them back.

    Invariant: `_running` is in order of rank. Its first sequence is never preempted and can
    always grow, so it finishes, and the next becomes first. Every waiting sequence becomes first
    eventually: being overtaken improves its rank (see `WaitingQueue`).

    With prefix caching a sequence starts with the pages that already hold its first tokens,
    shared with their other owners. Nobody writes to them: they are full, and new tokens go to
    later pages. Of the first CANDIDATES waiting sequences of one priority, the one with the
    longest known prefix starts first. A sequence waits while another computes its prefix; later
    ones may pass it.

    A `Pace` may ask for smaller steps and shorter dispatches. Sequences that can no longer meet
    the TTFT target go behind the others of their priority.

    The loop may plan step n+1 before it commits step n. Pages given back while a step in flight
    still writes to them may be taken at once, because device work runs in order.
    """

    def __init__(
        self,
        *,
        max_slots: int,
        max_step_tokens: int,
        page_size: int,
        num_pages: int,
        max_model_len: int,
        max_chunk_tokens: int | None = None,
        prefix_caching: bool = False,
        num_host_pages: int = 0,
        min_restored_pages: int = 1,
        max_overtaken: int = MAX_OVERTAKEN,
        pace: Pace | None = None,
    ) -> None:
        """Starts empty.

        Args:
          max_slots: sequences that run at the same time.
          max_step_tokens: tokens of one step, at least `max_slots`.
          page_size: tokens per page.
          num_pages: pages in the pool, null page included; one longest sequence must fit.
          max_model_len: tokens of the longest sequence, prompt and output.
          max_chunk_tokens: tokens of one chunk; None = limited by the step only.
          prefix_caching: keep full pages for sequences that begin with the same tokens.
          num_host_pages: evicted pages that fit in host memory.
          min_restored_pages: shorter runs of pages are computed, not fetched from the host.
          max_overtaken: later sequences that may start before the oldest waiting one.
          pace: holds the TTFT and TPOT targets; None = no targets.
        """
        # So every running sequence can decode in every step, and the first can always grow.
        assert max_step_tokens >= max_slots >= 1, f"{max_step_tokens=}, {max_slots=}"
        assert num_pages - 1 >= pages_for(max_model_len, page_size), f"{num_pages=}"
        assert max_chunk_tokens is None or max_chunk_tokens >= 1, f"{max_chunk_tokens=}"
        self._max_step_tokens = max_step_tokens
        self._pace = pace or Pace([max_step_tokens])
        self._max_chunk_tokens = max_chunk_tokens or max_step_tokens
        self._max_slots = max_slots
        self._max_model_len = max_model_len
        self._page_size = page_size
        self._pool = PagePool(num_pages)
        self._host = HostIndex(num_host_pages, min_restored_pages)
        self._prefixes = Prefixes(
            self._pool, self._host, page_size=page_size, enabled=prefix_caching
        )
        # 1: without prefixes to compare, sequences start strictly in order of rank.
        self._num_candidates = CANDIDATES if prefix_caching else 1
        self._free_slots = [Slot(i) for i in range(max_slots)]  # a heap: lowest slot first
        self._waiting = WaitingQueue(max_overtaken)
        self._running: list[TokenSequence] = []  # in order of rank
        self._preempted: list[TokenSequence] = []  # since the last plan
        self._num_arrivals = 0
        self.num_preemptions = 0  # since the start

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

    def add(self, sequence: TokenSequence) -> None:
        """Queues a sequence, its lengths checked: at its rank, or if new behind its priority."""
        assert sequence.order < 0 or sequence.num_preemptions, f"added twice: {sequence=}"
        assert 1 <= sequence.num_tokens < sequence.max_length <= self._max_model_len, (
            f"{sequence.num_tokens=}, {sequence.max_length=}, {self._max_model_len=}"
        )
        if sequence.order < 0:  # else restarted
            sequence.order, self._num_arrivals = self._num_arrivals, self._num_arrivals + 1
        self._waiting.add(sequence)

    def finish(self, sequence: TokenSequence) -> None:
        """Ends a sequence and frees its slot and pages. Its steps in flight no longer count."""
        assert sequence.order >= 0, f"never added: {sequence.request_id=}"
        assert sequence.status is not Status.FINISHED, f"finished twice: {sequence.request_id=}"
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            self._give_back(sequence)
        else:
            self._waiting.discard(sequence)
        sequence.status = Status.FINISHED

    def abort(self, sequence: TokenSequence) -> None:
        """Like `finish`, but does nothing if the sequence has already finished."""
        if sequence.status is not Status.FINISHED:
            self.finish(sequence)

    def plan(self, max_steps: int = 1, now_s: float = 0.0) -> StepPlan | None:
        """Decides the next dispatch and takes its pages and slots; None if nothing can run.

        With nothing in flight, None means that there is no work.

        Args:
          max_steps: most steps of a dispatch in which every row decodes.
          now_s: when the dispatch can start, on the clock of `TokenSequence.arrival_s`.
        """
        self._pass_over_late(now_s)
        builder = PlanBuilder(self._most_tokens(now_s), num_logits_rows_left=self._max_slots)
        num_untold = len(self._preempted)
        self._schedule_running(builder)
        # Admit nobody in a step that preempted somebody.
        if len(self._preempted) == num_untold:
            self._admit_waiting(builder)
        self._trim(builder)
        if not builder.chunks:
            in_flight = any(s.num_in_flight for s in (*self._running, *self._waiting))
            assert in_flight or not self.has_work, (
                f"stuck: {self.num_running=}, {self.num_waiting=}"
            )
            return None
        if max_steps > 1:
            most = STEPS_WHILE_WAITING if self._waiting else max_steps
            self._prolong(builder, self._pace.most_steps(len(builder.chunks), min(max_steps, most)))
        for sequence, chunk in builder.chunks.items():
            sequence.num_scheduled += chunk.num_tokens + chunk.num_steps - 1
            sequence.num_unread += chunk.samples * chunk.num_steps
            sequence.num_in_flight += chunk.num_steps
            # Publish prompt pages already: this step fills them before any later step reads them.
            self._prefixes.publish(sequence, min(chunk.stop, sequence.num_prompt_tokens))
        # A sequence preempted in a plan of None may have restarted or finished since.
        preempted = tuple(s for s in self._preempted if s.status is Status.WAITING)
        self._preempted.clear()
        saves, forgotten = self._host.take_moves()
        return builder.seal(preempted=preempted, saves=saves, forgotten=forgotten)

    def _pass_over_late(self, now_s: float) -> None:
        """Moves waiting sequences that will miss their deadline behind those that can meet it."""
        if not (self._pace.has_ttft_target and self._waiting):
            return
        decodes, prefills = self._decodes_and_prefills()
        num_tokens = sum(s.num_unscheduled for s in prefills)
        while first := self._waiting.first(1):
            sequence = first[0]
            if sequence.is_late or sequence.is_due:
                return  # later ones are late as well, or may not pass it
            if self._pace.can_meet(self._awaited(sequence), num_tokens, len(decodes), now_s):
                return
            self._waiting.step_back(sequence)

    def _most_tokens(self, now_s: float) -> int:
        if not self._pace.has_tpot_target:
            return self._max_step_tokens
        decodes, prefills = self._decodes_and_prefills()
        prompts = [*prefills, *self._waiting.first(CANDIDATES)]
        return self._pace.most_tokens(len(decodes), list(map(self._awaited, prompts)), now_s)

    def _decodes_and_prefills(self) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """Running sequences with tokens to compute: decodes, prefills; each in order of rank."""
        decodes = [s for s in self._running if s.num_unscheduled == 1]
        return decodes, [s for s in self._running if s.num_unscheduled > 1]

    def _awaited(self, sequence: TokenSequence) -> Awaited:
        has_begun = sequence.output_ids or sequence.num_unread  # its output
        deadline_s = math.inf if has_begun else self._pace.deadline_s(sequence.arrival_s)
        return Awaited(sequence.length - sequence.num_scheduled, deadline_s)

    def _trim(self, builder: PlanBuilder) -> None:
        """Leaves the end of prefills to the next step if that saves more padding than it costs.

        Every chunk keeps at least one token, so its sequence advances. Pages of the tokens cut
        off go back to the pool.
        """
        chunks = builder.chunks
        num_tokens = sum(chunk.num_tokens for chunk in chunks.values())
        num_left_out = num_tokens - self._pace.fill(num_tokens)
        if num_left_out > num_tokens - len(chunks):
            return
        for sequence, chunk in reversed(list(chunks.items())):  # cut the last in rank first
            num_cut = min(num_left_out, chunk.num_tokens - 1)
            if num_cut:
                kept = chunk.num_tokens - num_cut
                chunks[sequence] = self._cut_chunk(sequence, kept, chunk.num_logits_rows)
                self._return_pages(chunks[sequence], builder)
                num_left_out -= num_cut

    def _return_pages(self, chunk: Chunk, builder: PlanBuilder) -> None:
        """Gives back the pages of tokens cut off: a smaller program has fewer page writes."""
        pages = chunk.sequence.pages
        num_kept = pages_for(chunk.stop, self._page_size)
        self._pool.release(reversed(pages[num_kept:]))
        del pages[num_kept:]
        builder.keep_pages(chunk.slot, num_kept)

    def _prolong(self, builder: PlanBuilder, max_steps: int) -> None:
        """Gives a plan in which every row decodes more steps, as many as free pages allow.

        It preempts nobody: fewer steps cost one more dispatch, preemption costs computed tokens.
        """
        chunks = builder.chunks.values()
        if not all(c.decodes for c in chunks):
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
            builder.chunks[chunk.sequence] = chunk
            taken, page_ids = page_ids[:num_missing], page_ids[num_missing:]
            self._enter_pages(chunk, taken, builder)

    def _num_missing_pages(self, chunk: Chunk) -> int:
        num_tokens = chunk.stop + chunk.num_steps - 1
        num_missing = pages_for(num_tokens, self._page_size) - len(chunk.sequence.pages)
        assert num_missing >= 0, f"pages for tokens that are not planned: {chunk=}, {num_missing=}"
        return num_missing

    def commit(self, chunk: Chunk, token_id: int | None) -> None:
        """Records that a chunk was computed and its token read. Call in the order of the plans.

        Args:
          chunk: a planned chunk, committed once.
          token_id: the sampled token, or None if the chunk does not sample.
        """
        assert chunk.samples == (token_id is not None), f"{chunk.samples=}, {token_id=}"
        sequence = chunk.sequence
        if sequence.status is Status.FINISHED:  # while this chunk was in flight
            return
        sequence.num_in_flight -= 1
        sequence.num_scored += len(chunk.scored_positions)
        if token_id is not None:
            sequence.num_unread -= 1
            sequence.output_ids.append(token_id)
        if sequence.status is Status.RUNNING:  # else preempted: token valid, K/V lost
            sequence.num_computed += chunk.num_tokens
            self._prefixes.publish(sequence, sequence.num_computed)

    def forget_prefixes(self) -> None:
        """Empties the prefix cache; running sequences continue."""
        self._prefixes.forget(self._running)

    def _schedule_running(self, builder: PlanBuilder) -> None:
        decodes, prefills = self._decodes_and_prefills()
        num_rows_after = len(decodes) + len(prefills)
        for sequence in decodes + prefills:
            num_rows_after -= 1
            # An earlier row may have preempted this one, or left it no tokens.
            if sequence.status is Status.RUNNING and builder.num_tokens_left:
                # Reserve one row of logits for every later sequence.
                self._schedule(sequence, builder.num_logits_rows_left - num_rows_after, builder)

    def _admit_waiting(self, builder: PlanBuilder) -> None:
        if not (self._waiting and self._free_slots):  # the common case
            return
        num_spare_pages = self.num_free_pages - sum(map(self._num_pages_owed, self._running))
        coming = self._prefixes.coming(self._running)
        while self._free_slots and builder.num_tokens_left and builder.num_logits_rows_left:
            chosen = self._choose(coming)
            if chosen is None:
                break
            sequence, found = chosen
            num_pages = pages_for(sequence.num_tokens, self._page_size)
            # One page to grow into, but no more than max_length can fill.
            num_wanted = min(num_pages + 1, pages_for(sequence.max_length, self._page_size))
            num_taken = num_wanted - len(found.pages) + self._pool.num_idle(found.pages)
            if num_taken > num_spare_pages:
                break
            self._waiting.take(sequence)
            num_free = self.num_free_pages
            self._admit(sequence, found, builder)
            coming |= self._prefixes.coming([sequence])
            num_spare_pages -= num_free - self.num_free_pages + self._num_pages_owed(sequence)
            self._schedule(sequence, builder.num_logits_rows_left, builder)

    def _choose(self, coming: set[Coming]) -> tuple[TokenSequence, Found] | None:
        """The sequence to start next: of the first candidates, the longest known prefix.

        Skips a sequence whose prefix another is computing; later ones may start before it.
        """
        best = None
        for sequence in self._waiting.first(self._num_candidates):
            # A preempted sequence must wait for its tokens in flight, to compute them again.
            if sequence.num_in_flight or (best and best[0].rank[:2] != sequence.rank[:2]):
                break
            found = self._prefixes.find(sequence, self._running)
            if not self._prefixes.is_coming(sequence, found, coming):
                if best is None or found.num_tokens > best[1].num_tokens:
                    best = sequence, found
            if sequence.is_due:
                break
        return best

    def _admit(self, sequence: TokenSequence, found: Found, builder: PlanBuilder) -> None:
        insort(self._running, sequence, key=_rank)
        sequence.status = Status.RUNNING
        sequence.slot = heapq.heappop(self._free_slots)
        builder.admitted.append(sequence)
        self._pool.share(found.pages)
        self._host.restore(found.host_keys)
        num_restored = len(found.host_keys)
        fresh = self._pool.allocate(num_restored + (found.source is not None))
        assert fresh is not None, f"admitted without pages: {sequence.request_id=}"
        # All of them enter the page table when the slot's row is written.
        sequence.pages += [*found.pages, *fresh]
        builder.restores += map(PageRestore, found.host_keys, fresh)
        if found.source is not None:
            builder.copies.append(PageCopy(found.source, fresh[-1]))
        sequence.num_published = len(found.pages)
        self._prefixes.publish(sequence, (len(found.pages) + num_restored) * self._page_size)
        sequence.num_computed = sequence.num_scheduled = found.num_tokens
        if not sequence.num_preemptions:
            sequence.num_cached = found.num_tokens

    def _num_pages_owed(self, sequence: TokenSequence) -> int:
        # Pages still missing for its tokens and the next one.
        num_tokens = min(sequence.length + 1, sequence.max_length)
        return pages_for(num_tokens, self._page_size) - len(sequence.pages)

    def _schedule(
        self, sequence: TokenSequence, num_logits_rows_left: int, builder: PlanBuilder
    ) -> None:
        chunk = self._cut_chunk(sequence, builder.num_tokens_left, num_logits_rows_left)
        page_ids = self._take_pages(sequence, self._num_missing_pages(chunk), builder)
        if page_ids is None:
            return
        self._enter_pages(chunk, page_ids, builder)
        builder.add(chunk)

    def _enter_pages(self, chunk: Chunk, page_ids: list[PageId], builder: PlanBuilder) -> None:
        pages = chunk.sequence.pages
        for page_id in page_ids:
            builder.page_writes.append(PageWrite(chunk.slot, len(pages), page_id))
            pages.append(page_id)

    def _cut_chunk(
        self, sequence: TokenSequence, num_tokens_left: int, num_logits_rows_left: int
    ) -> Chunk:
        assert sequence.slot is not None, f"runs without a slot: {sequence.request_id=}"
        start = sequence.num_scheduled
        num_tokens = min(sequence.num_unscheduled, num_tokens_left, self._max_chunk_tokens)
        stop = start + num_tokens
        num_scores = 0
        if sequence.scores_prompt:
            first = max(start, sequence.num_scored)
            num_scores = max(0, min(stop, sequence.num_prompt_tokens - 1) - first)
            if num_scores + (stop == sequence.length) > num_logits_rows_left:
                stop = first + num_logits_rows_left
                num_scores = num_logits_rows_left
        assert stop > start, f"nothing to compute: {sequence.request_id=}, {start=}, {stop=}"
        samples = stop == sequence.length
        return Chunk(
            sequence,
            sequence.slot,
            start,
            stop - start,
            samples,
            num_logits_rows=num_scores + samples,
        )

    def _take_pages(
        self, sequence: TokenSequence, num_pages: int, builder: PlanBuilder
    ) -> list[PageId] | None:
        """Takes pages, preempting if none are free; None if the sequence itself was preempted."""
        while (page_ids := self._pool.allocate(num_pages)) is None:
            if self._preempt_last(builder) is sequence:
                return None
        return page_ids

    def _preempt_last(self, builder: PlanBuilder) -> TokenSequence:
        sequence = self._running.pop()
        builder.drop(sequence)
        self._give_back(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = sequence.num_scheduled = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.add(sequence)
        self._preempted.append(sequence)
        return sequence

    def _give_back(self, sequence: TokenSequence) -> None:
        assert sequence.slot is not None, f"runs without a slot: {sequence.request_id=}"
        self._pool.release(reversed(sequence.pages))
        sequence.pages.clear()
        sequence.num_published = 0
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = None


def _rank(sequence: TokenSequence) -> tuple[float, bool, int]:
    return sequence.rank
