"""The scheduler against a simulated device, under random arrivals, finishes and aborts.

The device keeps tokens in pages, finds them through its own page table (built from the plans'
page writes alone), and draws each token from all tokens it finds. So a page lent twice, a write
missed or a token not recomputed changes the outputs, which must be those of the request alone.
"""

import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jinfer.schedule.pace import Pace
from jinfer.schedule.page_pool import pages_for
from jinfer.schedule.plan import Chunk, StepPlan
from jinfer.schedule.scheduler import Scheduler
from jinfer.schedule.sequence import Status, TokenSequence

STOP = 0  # the token that ends a sequence, one draw in 40


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_slots: int = 8
    max_step_tokens: int = 32
    page_size: int = 4
    num_pages: int = 200
    max_model_len: int = 48
    max_chunk_tokens: int | None = None
    pace: Pace | None = None  # one that trims steps
    prefix_caching: bool = False
    num_host_pages: int = 0
    min_restored_pages: int = 1
    max_overtaken: int = 5
    max_steps: int = 1  # of one dispatch
    num_priorities: int = 1

    @property
    def in_order(self) -> bool:
        """Whether nobody begins before one that came earlier."""
        return not self.prefix_caching and self.num_priorities == 1


def rank(sequence: TokenSequence) -> tuple[float, int]:
    return sequence.rank


def draw(tokens: tuple[int, ...]) -> int:
    return hash(tokens) % 40


def outputs_alone(sequence: TokenSequence) -> list[int]:
    tokens = list(sequence.prompt_ids)
    while len(tokens) < sequence.max_length and tokens[-1] != STOP:
        tokens.append(draw(tuple(tokens)))
    return tokens[sequence.num_prompt_tokens :]


class Simulation:
    """A scheduler, a device, and the loop between them; checks everything after each move."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        others = ("max_steps", "num_priorities")
        own = {name: value for name, value in vars(limits).items() if name not in others}
        self.scheduler = Scheduler(**own)
        self.sequences: list[TokenSequence] = []  # all there ever were, in order of arrival
        self.alive: list[TokenSequence] = []
        self.first_admitted: list[TokenSequence] = []
        self.scored: dict[TokenSequence, list[int]] = {}
        self.table: dict[int, dict[int, int]] = {i: {} for i in range(limits.max_slots)}
        self.cells: dict[tuple[int, int], tuple[TokenSequence, int, int]] = {}
        self.last_token: dict[int, int] = {}  # of each slot
        self.in_flight: deque[tuple[StepPlan, list[list[int | None]]]] = deque()
        self.stopped: set[int] = set()  # slots that drew the end token
        self.num_long = 0  # dispatches of several steps
        self.host: dict[bytes, dict[int, tuple[TokenSequence, int, int]]] = {}  # cells of each page
        self.num_overtaken: Counter[TokenSequence] = Counter()  # while it was the oldest that waits
        self.num_restored = self.num_copied = 0

    # The moves.

    def add(self, num_prompt_tokens: int, max_length: int, *, scores_prompt: bool = False) -> None:
        number = len(self.sequences)
        prompt = [1 + (number * 7919 + i * 31) % 97 for i in range(num_prompt_tokens)]
        if self.limits.prefix_caching:  # prompts of a few families begin alike
            prompt = [1 + (number % 3 * 7919 + i * 31) % 97 for i in range(num_prompt_tokens)]
            prompt[-1] = 1 + number % 5
            before = self.sequences[-1].prompt_ids if self.sequences else prompt
            if number % 4 == 3 and len(before) < max_length:
                prompt = before  # another continuation of the same request
        sequence = TokenSequence(f"r{number}", 0, prompt, max_length, scores_prompt)
        sequence.priority = number * 7 % self.limits.num_priorities
        self.sequences.append(sequence)
        self.alive.append(sequence)
        self.scored[sequence] = []
        self.scheduler.add(sequence)
        assert sequence.order == number
        self.check_ownership()

    def end(self, sequence: TokenSequence, *, by_abort: bool) -> None:
        self.alive.remove(sequence)
        if by_abort:
            self.scheduler.abort(sequence)
            self.scheduler.abort(sequence)  # once more does nothing
        else:
            self.scheduler.finish(sequence)
        assert sequence.status is Status.FINISHED
        self.check_ownership()

    def dispatch(self) -> bool:
        running = [s for s in self.alive if s.status is Status.RUNNING]
        decoding = [s for s in running if s.num_unscheduled == 1]
        growing = [s for s in running if s.num_unscheduled]
        waiting = [s for s in self.alive if s.status is Status.WAITING]
        starts = {s: s.num_scheduled for s in self.alive}
        plan = self.scheduler.plan(self.limits.max_steps)
        if plan is None:
            assert self.in_flight or not self.alive
            return False
        self.num_long += plan.num_steps > 1
        self.check_budgets(plan)
        chunks = {chunk.sequence: chunk for chunk in plan.chunks}
        assert len(chunks) == len(plan.chunks)
        for chunk in plan.chunks:
            cached = self.limits.prefix_caching and chunk.sequence in plan.admitted
            assert chunk.start == starts[chunk.sequence] or cached or chunk.sequence.num_preemptions
            assert self.in_flight or chunk.start == chunk.sequence.num_computed
        assert all(s in chunks or s in plan.preempted for s in decoding)
        if growing:  # the first always gets on
            assert min(growing, key=rank) in chunks
        if running:
            assert min(running, key=rank) not in plan.preempted
        self.count_overtaken(waiting, plan)
        if not (plan.preempted or self.limits.prefix_caching or self.limits.pace):
            self.check_nobody_waits_for_nothing(plan)
        self.in_flight.append((plan, self.execute(plan)))
        self.check_ownership()
        return True

    def count_overtaken(self, waiting: list[TokenSequence], plan: StepPlan) -> None:
        if not self.in_flight and not plan.preempted and not plan.admitted and waiting:
            assert len(plan.chunks)  # somebody else gets on
        left = sorted(waiting, key=lambda s: s.order)
        for sequence in plan.admitted:
            left.remove(sequence)
            if left and left[0].order < sequence.order:
                self.num_overtaken[left[0]] += 1
                assert self.num_overtaken[left[0]] <= self.limits.max_overtaken
                assert not self.limits.in_order

    def settle(self) -> None:
        plan, tokens_of_chunks = self.in_flight.popleft()
        for whole, token_ids in zip(plan.chunks, tokens_of_chunks, strict=True):
            for chunk, token_id in zip(whole.steps(), token_ids, strict=False):
                self.settle_chunk(chunk, token_id)
            ended = whole.sequence.status is Status.FINISHED
            assert ended or len(token_ids) == whole.num_steps

    def settle_chunk(self, chunk: Chunk, token_id: int | None) -> None:
        sequence = chunk.sequence
        self.scheduler.commit(chunk, token_id)
        if sequence.status is Status.FINISHED:
            return
        self.scored[sequence] += chunk.scored_positions
        if token_id == STOP or sequence.num_tokens == sequence.max_length:
            self.end(sequence, by_abort=False)
            self.check_answer(sequence)
        self.check_ownership()

    def drain(self, depth: int = 0) -> None:
        num_steps = 0
        while self.alive or self.in_flight:
            if not self.dispatch() or len(self.in_flight) > depth:
                self.settle()
            num_steps += 1
            assert num_steps < 10_000, "starved"

    # The device.

    def move_pages(self, plan: StepPlan) -> None:
        page_size = self.limits.page_size
        for save in plan.saves:
            assert save.key not in self.host
            cells = [self.cells.pop((save.page_id, offset)) for offset in range(page_size)]
            self.host[save.key] = dict(enumerate(cells))
        for restore in plan.restores:
            for offset, cell in self.host[restore.key].items():
                self.cells[restore.page_id, offset] = cell
        for key in plan.forgotten:
            del self.host[key]
        assert len(self.host) <= self.limits.num_host_pages
        for copy in plan.copies:
            for offset in range(page_size):
                cell = self.cells.get((copy.source_id, offset))
                if cell is not None:
                    self.cells[copy.page_id, offset] = cell
        self.num_restored += len(plan.restores)
        self.num_copied += len(plan.copies)

    def execute(self, plan: StepPlan) -> list[list[int | None]]:
        self.move_pages(plan)
        for sequence in plan.admitted:
            assert sequence.slot is not None
            [start] = [chunk.start for chunk in plan.chunks if chunk.sequence is sequence]
            cached = sequence.pages[: pages_for(start, self.limits.page_size)]
            self.table[sequence.slot] = dict(enumerate(cached))
            self.stopped.discard(sequence.slot)
            if sequence not in self.first_admitted:
                self.first_admitted.append(sequence)
        for write in plan.page_writes:
            self.table[write.slot][write.index] = write.page_id
        if plan.num_steps == 1:
            alive = [chunk for chunk in plan.chunks if chunk.slot not in self.stopped]
            for chunk in alive:
                self.write(chunk)
            drawn = {chunk.slot: self.attend(chunk) for chunk in alive}
            # What a stopped row gives is nobody's.
            return [[drawn.get(chunk.slot, STOP)] for chunk in plan.chunks]
        return [list(self.decode(chunk)) for chunk in plan.chunks]

    def decode(self, whole: Chunk) -> Iterator[int | None]:
        for chunk in whole.steps():
            if whole.slot in self.stopped:
                return
            self.write(chunk)
            yield self.attend(chunk)

    def write(self, chunk: Chunk) -> None:
        for position in range(chunk.start, chunk.stop):
            known = position < chunk.sequence.num_tokens
            token = chunk.sequence.token_at(position) if known else self.last_token[chunk.slot]
            self.cells[self.cell(chunk.slot, position)] = (chunk.sequence, position, token)

    def attend(self, chunk: Chunk) -> int | None:
        found = [self.cells[self.cell(chunk.slot, p)] for p in range(chunk.stop)]
        for position, (owner, written_position, _) in enumerate(found):
            assert owner is chunk.sequence or self.limits.prefix_caching
            assert written_position == position
        if not chunk.samples:
            return None
        self.last_token[chunk.slot] = draw(tuple(token for _, _, token in found))
        if self.last_token[chunk.slot] == STOP:
            self.stopped.add(chunk.slot)
        return self.last_token[chunk.slot]

    def cell(self, slot: int, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.limits.page_size)
        return self.table[slot][index], offset

    # What must hold.

    def check_budgets(self, plan: StepPlan) -> None:
        limits = self.limits
        assert plan.num_tokens == sum(chunk.num_tokens for chunk in plan.chunks)
        assert plan.num_logits_rows == sum(
            len(chunk.scored_positions) + chunk.samples for chunk in plan.chunks
        )
        assert plan.num_tokens <= limits.max_step_tokens
        if limits.pace and len(plan.chunks) <= limits.pace.fill(plan.num_tokens):
            assert plan.num_tokens == limits.pace.fill(plan.num_tokens)
        assert plan.num_logits_rows <= limits.max_slots
        num_written = sum(chunk.num_tokens + chunk.num_steps - 1 for chunk in plan.chunks)
        assert len(plan.page_writes) <= len(plan.chunks) + num_written // limits.page_size
        if plan.only_decodes:  # what a decode program of so many rows enters
            per_row = pages_for(limits.max_steps, limits.page_size)
            assert len(plan.page_writes) <= len(plan.chunks) * per_row
        assert len({chunk.slot for chunk in plan.chunks}) == len(plan.chunks) <= limits.max_slots
        for chunk in plan.chunks:
            assert 1 <= chunk.num_tokens <= (limits.max_chunk_tokens or limits.max_step_tokens)
            assert chunk.slot == chunk.sequence.slot
            assert 1 <= chunk.num_steps <= limits.max_steps
            assert chunk.num_steps == 1 or all(c.samples and c.num_tokens == 1 for c in plan.chunks)
            *_, last = chunk.steps()
            assert last.stop == chunk.sequence.num_scheduled
            # A draw in flight was added to the length by planning it.
            assert chunk.samples == (last.stop == chunk.sequence.length - chunk.samples)
            assert chunk.num_logits_rows == len(chunk.scored_positions) + chunk.samples
        assert not {s for s in plan.preempted if s.slot is not None}
        assert all(s.num_scheduled for s in plan.admitted)

    def check_nobody_waits_for_nothing(self, plan: StepPlan) -> None:
        waiting = [s for s in self.alive if s.status is Status.WAITING]
        if not waiting or min(waiting, key=rank).num_in_flight:
            return
        limits, head = self.limits, min(waiting, key=rank)
        running = [s for s in self.alive if s.status is Status.RUNNING]
        # Room for all that is running, one more page each, and the head with one page more.
        promised = sum(pages_for(s.length, limits.page_size) + 1 - len(s.pages) for s in running)
        wanted = pages_for(head.num_tokens, limits.page_size) + 1
        assert (
            len(running) == limits.max_slots
            or plan.num_tokens == limits.max_step_tokens
            or plan.num_logits_rows == limits.max_slots
            or wanted + promised > self.scheduler.num_free_pages
        )

    def check_ownership(self) -> None:
        running = [s for s in self.alive if s.status is Status.RUNNING]
        waiting = [s for s in self.alive if s.status is Status.WAITING]
        assert len(running) == self.scheduler.num_running
        assert len(waiting) == self.scheduler.num_waiting
        assert self.scheduler.has_work == bool(self.alive)
        if self.limits.in_order:
            # `alive` is in order of arrival, so this is first come first served:
            assert running + waiting == self.alive
            assert self.first_admitted == sorted(self.first_admitted, key=lambda s: s.order)
        slots = [s.slot for s in running]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(self.limits.max_slots))
        pages = [page_id for s in running for page_id in s.pages]
        assert len(set(pages)) == len(pages) or self.limits.prefix_caching
        assert 0 not in pages
        assert len(set(pages)) + self.scheduler.num_free_pages == self.limits.num_pages - 1
        for s in running:
            assert s.slot is not None
            num_pages = pages_for(s.num_scheduled, self.limits.page_size)
            assert len(s.pages) == num_pages
            assert s.pages == [self.table[s.slot][i] for i in range(len(s.pages))]
            assert s.num_computed <= s.num_scheduled <= s.length <= s.max_length
        for s in self.sequences[-40:]:
            if s.status is not Status.RUNNING:
                assert s.slot is None and not s.pages

    def check_answer(self, sequence: TokenSequence) -> None:
        assert sequence.output_ids == outputs_alone(sequence)
        num_scored = sequence.num_prompt_tokens - 1 if sequence.scores_prompt else 0
        assert self.scored[sequence] == list(range(num_scored))
        assert sequence.num_scored == num_scored

    def check_empty(self) -> None:
        assert not self.scheduler.has_work
        assert self.scheduler.num_free_pages == self.limits.num_pages - 1
        for _ in range(self.limits.max_slots):
            self.add(1, 2)
        self.dispatch()  # every slot is free: the lowest go first, as far as pages last
        num_fitting = (self.limits.num_pages - 1) // pages_for(2, self.limits.page_size)
        slots = sorted(s.slot for s in self.alive if s.slot is not None)
        assert slots == list(range(min(self.limits.max_slots, num_fitting)))
        self.drain()


def run_randomly(limits: Limits, num_requests: int, depth: int, seed: int) -> Simulation:
    """`depth` steps stay unread while the next is planned."""
    rng = random.Random(seed)
    sim = Simulation(limits)

    def disturb() -> None:
        if len(sim.sequences) < num_requests and sim.scheduler.num_waiting < 12:
            for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
                num_prompt_tokens = rng.randint(1, min(30, limits.max_model_len - 1))
                max_length = rng.randint(num_prompt_tokens + 1, limits.max_model_len)
                sim.add(num_prompt_tokens, max_length, scores_prompt=rng.random() < 0.3)
        if sim.alive and rng.random() < 0.04:
            sim.end(rng.choice(sim.alive), by_abort=rng.random() < 0.5)
        if limits.prefix_caching and rng.random() < 0.01:
            sim.scheduler.forget_prefixes()

    while sim.alive or sim.in_flight or len(sim.sequences) < num_requests:
        disturb()
        if (not sim.dispatch() and sim.in_flight) or len(sim.in_flight) > depth:
            disturb()
            sim.settle()
    sim.check_empty()
    return sim


ROOMY = Limits(num_pages=8 * 12 + 1)
TIGHT = Limits(num_pages=13)  # one longest sequence, and not a page more
CASES = {
    "roomy": ROOMY,
    "tight": TIGHT,
    "tight_chunks_of_1": Limits(num_pages=16, max_chunk_tokens=1),
    "tight_chunks_of_7": Limits(num_pages=16, max_chunk_tokens=7),
    "tight_pages_of_1": Limits(num_pages=60, page_size=1, max_chunk_tokens=16),
    "smallest_step": Limits(num_pages=20, max_step_tokens=8),
    "one_slot": Limits(max_slots=1, num_pages=13),
    "trimmed_steps": Limits(num_pages=20, pace=Pace((1, 8, 20, 32), step_cost_tokens=2)),
    "long_steps": Limits(num_pages=30, max_chunk_tokens=64, max_step_tokens=64),
}


@pytest.mark.parametrize("depth", [0, 1], ids=["read_at_once", "one_step_ahead"])
@pytest.mark.parametrize("name", CASES)
def test_random_requests(name: str, depth: int) -> None:
    sim = run_randomly(CASES[name], num_requests=150, depth=depth, seed=depth)
    num_preemptions = sum(s.num_preemptions for s in sim.sequences)
    if name in ("roomy", "one_slot"):
        assert num_preemptions == 0
    else:
        assert num_preemptions > 10


@pytest.mark.parametrize("depth", [0, 1], ids=["read_at_once", "one_dispatch_ahead"])
@pytest.mark.parametrize("name", CASES)
def test_random_requests_that_decode_several_steps_at_once(name: str, depth: int) -> None:
    limits = replace(CASES[name], max_steps=6)
    sim = run_randomly(limits, num_requests=150, depth=depth, seed=depth + 2)
    assert sim.num_long > 10


@pytest.mark.parametrize("depth", [0, 1], ids=["read_at_once", "one_dispatch_ahead"])
@pytest.mark.parametrize("name", CASES)
def test_random_requests_that_share_prefixes(name: str, depth: int) -> None:
    limits = replace(CASES[name], max_steps=3, prefix_caching=True)
    sim = run_randomly(limits, num_requests=150, depth=depth, seed=depth + 4)
    num_cached = sum(s.num_cached for s in sim.sequences)
    assert num_cached > 0.05 * sum(s.num_prompt_tokens for s in sim.sequences)
    assert sim.num_copied or limits.page_size == 1 or limits.max_slots == 1
    sim.scheduler.forget_prefixes()
    sim.check_empty()


@pytest.mark.parametrize("depth", [0, 1], ids=["read_at_once", "one_dispatch_ahead"])
@pytest.mark.parametrize("num_host_pages", [3, 40])
def test_random_requests_whose_pages_go_to_the_host_and_back(
    num_host_pages: int, depth: int
) -> None:
    limits = replace(TIGHT, prefix_caching=True, num_host_pages=num_host_pages, max_steps=3)
    sim = run_randomly(limits, num_requests=300, depth=depth, seed=depth + 6)
    assert sim.num_restored > 20 and len(sim.host) > 0
    sim.scheduler.forget_prefixes()
    sim.check_empty()


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_random_requests_of_several_priorities(name: str, prefix_caching: bool) -> None:
    limits = replace(CASES[name], num_priorities=3, prefix_caching=prefix_caching, max_steps=2)
    sim = run_randomly(limits, num_requests=200, depth=1, seed=8)
    if name in ("tight", "one_slot"):  # so long a queue that some were overtaken until due
        assert max(sim.num_overtaken.values()) == limits.max_overtaken
        assert any(s.is_due for s in sim.sequences)


@given(
    order=st.fixed_dictionaries(
        {
            "prefix_caching": st.booleans(),
            "num_host_pages": st.integers(0, 6),
            "min_restored_pages": st.integers(1, 3),
            "max_overtaken": st.integers(1, 4),
            "num_priorities": st.integers(1, 3),
        }
    ),
    max_steps=st.integers(1, 9),
    max_slots=st.integers(1, 6),
    num_more_tokens=st.integers(0, 20),
    page_size=st.integers(1, 9),
    num_more_pages=st.integers(0, 10),
    max_chunk_tokens=st.one_of(st.none(), st.integers(1, 20)),
    step_cost_tokens=st.one_of(st.none(), st.integers(0, 4)),
    depth=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_limits(
    *, order, max_steps, max_slots, num_more_tokens, page_size, num_more_pages,
    max_chunk_tokens, step_cost_tokens, depth, seed,
) -> None:  # fmt: skip
    max_step_tokens = max_slots + num_more_tokens
    buckets = sorted({1, max_slots, max_step_tokens})
    limits = Limits(
        max_slots=max_slots,
        max_step_tokens=max_step_tokens,
        pace=Pace(buckets, step_cost_tokens=step_cost_tokens),
        page_size=page_size,
        num_pages=1 + pages_for(24, page_size) + num_more_pages,
        max_model_len=24,
        max_chunk_tokens=max_chunk_tokens,
        max_steps=max_steps,
        **order,
    )
    run_randomly(limits, num_requests=12, depth=depth, seed=seed)


@pytest.mark.parametrize("depth", [0, 1], ids=["read_at_once", "one_step_ahead"])
def test_an_abort_at_each_possible_point(depth: int) -> None:
    limits = Limits(max_slots=3, max_step_tokens=6, num_pages=7, max_model_len=24)
    lengths = ((9, 24), (14, 20), (3, 24), (5, 18))
    states = set()
    for victim in range(len(lengths)):
        point = 0
        while True:
            sim = Simulation(limits)
            for num_prompt_tokens, max_length in lengths:
                sim.add(num_prompt_tokens, max_length, scores_prompt=True)
            if not _move(sim, point, depth):
                break  # past the end of the whole run
            sequence = sim.sequences[victim]
            if sequence in sim.alive:
                states.add((sequence.status, sequence.num_computed > 0, len(sim.in_flight)))
                states.add(("preempted", sequence.num_preemptions > 0))
                sim.end(sequence, by_abort=True)
            sim.drain(depth)
            sim.check_empty()
            point += 1
        assert point > 40
    assert {status for status, *_ in states} == {Status.WAITING, Status.RUNNING, "preempted"}
    assert ("preempted", True) in states
    assert (Status.RUNNING, False, 1) in states and (Status.RUNNING, True, 1) in states


def _move(sim: Simulation, num_moves: int, depth: int) -> bool:
    """Makes so many moves, a plan or a commit each; False if the work ends before."""
    for _ in range(num_moves):
        if not sim.alive and not sim.in_flight:
            return False
        if len(sim.in_flight) > depth or not sim.dispatch():
            sim.settle()
    return True
