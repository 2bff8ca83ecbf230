"""What the scheduler decides, case by case."""

from collections.abc import Iterable
from typing import Any

import pytest

from jinfer.axes import Slot
from jinfer.schedule.pace import Pace
from jinfer.schedule.plan import PageCopy, PageWrite, StepPlan
from jinfer.schedule.scheduler import Scheduler
from jinfer.schedule.sequence import Status, TokenSequence

pytestmark = pytest.mark.smoke

LIMITS = dict(max_slots=4, max_step_tokens=16, page_size=4, num_pages=50, max_model_len=64)


def make(**changes: Any) -> Scheduler:
    return Scheduler(**{**LIMITS, **changes})


def add(
    scheduler: Scheduler, *num_prompt_tokens: int, max_length: int = 64, scores_prompt: bool = False
) -> list[TokenSequence]:
    sequences = [
        TokenSequence("r", i, list(range(100, 100 + num_tokens)), max_length, scores_prompt)
        for i, num_tokens in enumerate(num_prompt_tokens)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def plan(scheduler: Scheduler) -> StepPlan:
    step = scheduler.plan()
    assert step is not None
    return step


def commit(scheduler: Scheduler, step: StepPlan, token_id: int = 7) -> None:
    for chunk in step.chunks:
        scheduler.commit(chunk, token_id if chunk.samples else None)


def run_step(scheduler: Scheduler) -> StepPlan:
    step = plan(scheduler)
    commit(scheduler, step)
    return step


def rows(step: StepPlan, sequences: Iterable[TokenSequence]) -> list[tuple[int, int, int, bool]]:
    """Of each chunk: which sequence, from, to, and whether it samples."""
    order = list(sequences)
    return [(order.index(c.sequence), c.start, c.stop, c.samples) for c in step.chunks]


def test_nothing_to_do() -> None:
    scheduler = make()
    assert scheduler.plan() is None
    assert not scheduler.has_work
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_free_pages) == (0, 0, 49)


def test_a_prompt_and_then_its_tokens() -> None:
    scheduler = make()
    (a,) = add(scheduler, 6)
    step = plan(scheduler)
    assert rows(step, [a]) == [(0, 0, 6, True)]
    assert step.admitted == (a,)
    assert step.page_writes == (
        PageWrite(Slot(0), 0, a.pages[0]),
        PageWrite(Slot(0), 1, a.pages[1]),
    )
    assert (step.num_tokens, step.num_logits_rows, step.preempted) == (6, 1, ())
    assert (a.slot, a.status, a.num_computed) == (0, Status.RUNNING, 0)
    commit(scheduler, step, 42)
    assert (a.output_ids, a.num_computed, a.num_tokens) == ([42], 6, 7)
    step = run_step(scheduler)
    assert rows(step, [a]) == [(0, 6, 7, True)]
    assert (step.admitted, step.page_writes) == ((), ())
    run_step(scheduler)
    # The ninth token is the first of a third page.
    assert run_step(scheduler).page_writes == (PageWrite(Slot(0), 2, a.pages[2]),)


def test_decoding_first_then_prefills_then_the_waiting() -> None:
    scheduler = make(max_step_tokens=8)
    a, b, c = sequences = add(scheduler, 3, 12, 4)
    assert rows(run_step(scheduler), sequences) == [(0, 0, 3, True), (1, 0, 5, False)]
    assert rows(run_step(scheduler), sequences) == [(0, 3, 4, True), (1, 5, 12, True)]
    assert (b.status, c.status) == (Status.RUNNING, Status.WAITING)
    step = run_step(scheduler)
    assert rows(step, sequences) == [(0, 4, 5, True), (1, 12, 13, True), (2, 0, 4, True)]
    assert step.admitted == (c,)
    assert [s.slot for s in sequences] == [0, 1, 2]


def test_a_step_leaves_out_what_would_only_be_padded() -> None:
    scheduler = make(max_step_tokens=32, pace=Pace((1, 8, 32), step_cost_tokens=2))
    a, b, c = sequences = add(scheduler, 1, 5, 4)
    # 10 tokens are 8 and then 2: the last in rank is cut, with the pages it has.
    assert rows(run_step(scheduler), sequences) == [
        (0, 0, 1, True),
        (1, 0, 5, True),
        (2, 0, 2, False),
    ]
    assert len(c.pages) == 1 and c.num_computed == 2
    step = run_step(scheduler)
    assert rows(step, sequences) == [(0, 1, 2, True), (1, 5, 6, True), (2, 2, 4, True)]
    assert step.page_writes == ()


def test_a_step_of_decodes_alone_is_not_cut() -> None:
    scheduler = make(max_slots=10, max_step_tokens=32, pace=Pace((1, 8, 32), step_cost_tokens=0))
    add(scheduler, *[1] * 9)
    assert run_step(scheduler).num_tokens == 9


@pytest.mark.parametrize("max_chunk_tokens", [1, 7, 16, 64])
def test_chunks_of_any_size_make_the_same_prompt(max_chunk_tokens: int) -> None:
    scheduler = make(max_chunk_tokens=max_chunk_tokens, max_step_tokens=100)
    (a,) = add(scheduler, 50)
    stops, num_pages = [], 0
    while not a.output_ids:
        step = run_step(scheduler)
        (chunk,) = step.chunks
        assert chunk.num_logits_rows == chunk.samples
        num_pages += len(step.page_writes)
        assert num_pages == -(-chunk.stop // 4)  # no page before its chunk
        stops.append(chunk.stop)
    assert stops == [*range(max_chunk_tokens, 50, max_chunk_tokens), 50]


def test_a_head_that_does_not_fit_blocks_those_behind() -> None:
    scheduler = make(num_pages=17, max_step_tokens=64)  # 16 pages
    a, b, c = sequences = add(scheduler, 32, 29, 1)
    # After a's 8 pages and one for its next token 7 are left; b wants 8 and one more.
    assert rows(run_step(scheduler), sequences) == [(0, 0, 32, True)]
    assert rows(run_step(scheduler), sequences) == [(0, 32, 33, True)]
    scheduler.finish(a)
    step = run_step(scheduler)
    assert step.admitted == (b, c)


@pytest.mark.parametrize(("num_pages", "admitted"), [(1 + 9 + 7, True), (1 + 9 + 6, False)])
def test_admission_wants_the_whole_prompt_and_a_page_more(num_pages: int, admitted: bool) -> None:
    scheduler = make(num_pages=num_pages, max_model_len=60, max_step_tokens=60)
    add(scheduler, 32, 21, max_length=60)  # 8 pages and one to come; 6 and one more
    assert len(run_step(scheduler).admitted) == 1 + admitted


def test_pages_promised_to_a_prefill_are_not_promised_again() -> None:
    scheduler = make(num_pages=17, max_chunk_tokens=4)
    a, b = sequences = add(scheduler, 40, 30)
    for start in range(0, 40, 4):  # 11 of 16 pages are a's from the start
        step = run_step(scheduler)
        assert rows(step, sequences) == [(0, start, start + 4, start == 36)]
    assert b.status is Status.WAITING


def test_the_longest_sequence_needs_no_page_beyond_its_end() -> None:
    scheduler = make(num_pages=17, max_step_tokens=64)  # exactly 64 tokens
    (a,) = add(scheduler, 63)
    assert run_step(scheduler).num_tokens == 63
    assert a.num_unscheduled == 0


def test_the_lowest_free_slot_goes_first() -> None:
    scheduler = make()
    a, b, c, d = add(scheduler, 1, 1, 1, 1)
    run_step(scheduler)
    scheduler.finish(c)
    scheduler.abort(a)
    e, f = add(scheduler, 1, 1)
    run_step(scheduler)
    assert [s.slot for s in (a, b, c, d, e, f)] == [None, 1, None, 3, 0, 2]


def prefilled(num_pages: int, *num_prompt_tokens: int, **limits: int):
    scheduler = make(num_pages=num_pages, max_model_len=16, **limits)
    sequences = add(scheduler, *num_prompt_tokens, max_length=16)
    run_step(scheduler)
    assert scheduler.num_running == len(sequences)
    return scheduler, sequences


def test_the_youngest_is_preempted_and_resumes_first() -> None:
    scheduler, (a, b) = prefilled(6, 7, 4)  # 5 pages: a has 2, b 1
    (c,) = add(scheduler, 1, max_length=16)
    run_step(scheduler)  # a 8, b 5 tokens: 4 pages
    step = plan(scheduler)  # a's ninth token takes the last page
    assert rows(step, [a, b]) == [(0, 8, 9, True), (1, 5, 6, True)]
    commit(scheduler, step)
    for _ in range(2):
        run_step(scheduler)  # b fills its second page
    step = plan(scheduler)  # b wants a third page; it is the youngest itself
    assert rows(step, [a]) == [(0, 11, 12, True)]
    assert step.preempted == (b,)
    assert (b.num_computed, b.pages, b.slot, b.num_preemptions) == (0, [], None, 1)
    assert len(b.output_ids) == 5
    assert step.admitted == ()  # c would fit, but is behind b
    commit(scheduler, step)
    assert run_step(scheduler).preempted == ()  # it is told once
    scheduler.finish(a)
    step = plan(scheduler)
    assert step.admitted == (b, c)
    assert rows(step, [b, c]) == [(0, 0, 9, True), (1, 0, 1, True)]  # b's outputs once more
    assert b.tokens(0, 9) == [100, 101, 102, 103, 7, 7, 7, 7, 7]


def test_a_decoding_row_preempts_a_younger_one() -> None:
    scheduler, (a, b) = prefilled(5, 4, 4)  # 4 pages: each has one
    for _ in range(4):
        run_step(scheduler)  # both fill their second
    step = plan(scheduler)
    assert rows(step, [a]) == [(0, 8, 9, True)]
    assert (step.preempted, step.num_tokens, step.num_logits_rows) == ((b,), 1, 1)


def test_a_prefill_preempts_a_younger_decoding_row_of_the_same_plan() -> None:
    scheduler = make(num_pages=10, max_model_len=36, max_chunk_tokens=2)
    a, b = add(scheduler, 24, 4, max_length=36)
    for _ in range(10):
        run_step(scheduler)
    assert (a.num_computed, b.num_computed, scheduler.num_free_pages) == (20, 12, 1)
    page_ids = list(a.pages)
    step = plan(scheduler)  # b decodes first and takes the last page; then a wants one
    assert rows(step, [a]) == [(0, 20, 22, False)]
    assert step.preempted == (b,)
    assert step.page_writes == (PageWrite(Slot(0), 5, a.pages[5]),)
    assert a.pages[:5] == page_ids
    assert (step.num_tokens, step.num_logits_rows) == (2, 0)
    assert (b.num_unread, b.num_in_flight, b.num_scheduled, b.num_computed) == (0, 0, 0, 0)
    assert scheduler.num_free_pages == 3


def test_scored_prompts_are_cut_to_the_rows_of_logits() -> None:
    scheduler = make(max_slots=4)
    (a,) = add(scheduler, 10, scores_prompt=True)
    steps = [run_step(scheduler) for _ in range(4)]
    assert [rows(s, [a])[0][1:] for s in steps] == [
        (0, 4, False),
        (4, 8, False),
        (8, 10, True),
        (10, 11, True),
    ]
    positions = [step.chunks[0].scored_positions for step in steps]
    assert list(map(list, positions)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8], []]
    assert a.num_scored == 9


def test_sampling_waits_when_scores_take_the_last_row_of_logits() -> None:
    scheduler = make(max_slots=4)
    (a,) = add(scheduler, 5, scores_prompt=True)
    assert rows(run_step(scheduler), [a]) == [(0, 0, 4, False)]
    assert rows(run_step(scheduler), [a]) == [(0, 4, 5, True)]


def test_scoring_leaves_a_row_of_logits_to_every_sequence() -> None:
    scheduler = make(max_slots=5, max_chunk_tokens=4)
    a, b, c = sequences = add(scheduler, 20, 8, 8)
    a.scores_prompt = True
    step = run_step(scheduler)
    assert rows(step, sequences) == [(0, 0, 4, False), (1, 0, 4, False), (2, 0, 4, False)]
    assert step.num_logits_rows == 4
    step = run_step(scheduler)  # b and c want to draw, so a may score three
    assert rows(step, sequences) == [(0, 4, 7, False), (1, 4, 8, True), (2, 4, 8, True)]
    assert step.num_logits_rows == 5


def test_without_a_row_of_logits_left_nobody_is_admitted() -> None:
    scheduler = make(max_slots=4)
    a, b = sequences = add(scheduler, 20, 2, scores_prompt=True)
    assert rows(run_step(scheduler), sequences) == [(0, 0, 4, False)]
    assert b.status is Status.WAITING


def test_what_was_scored_is_not_scored_again() -> None:
    # Chunks of one, so that b is still at its prompt when a wants b's pages.
    scheduler = make(num_pages=7, max_model_len=16, max_chunk_tokens=1)
    (a,) = add(scheduler, 4, max_length=16)
    for _ in range(4):
        run_step(scheduler)
    (b,) = add(scheduler, 12, max_length=16, scores_prompt=True)
    steps = [run_step(scheduler) for _ in range(9)]
    assert [p for step in steps[:8] for p in step.chunks[1].scored_positions] == list(range(8))
    assert (steps[8].preempted, b.num_computed, b.num_scored) == ((b,), 0, 8)
    scheduler.finish(a)
    steps = [run_step(scheduler) for _ in range(12)]
    positions = [step.chunks[0].scored_positions for step in steps]
    assert list(map(list, positions)) == [[]] * 8 + [[8], [9], [10], []]
    assert (b.num_scored, b.output_ids) == (11, [7])


def test_planning_ahead_of_the_tokens() -> None:
    scheduler = make()
    (a,) = add(scheduler, 3, max_length=5)
    first = plan(scheduler)
    second = plan(scheduler)  # its token is the one that `first` draws
    assert rows(first, [a]) + rows(second, [a]) == [(0, 0, 3, True), (0, 3, 4, True)]
    assert scheduler.plan() is None  # the last token has been drawn
    assert (a.num_computed, a.num_scheduled, a.num_tokens, a.length) == (0, 4, 3, 5)
    commit(scheduler, first, 8)
    commit(scheduler, second, 9)
    assert (a.num_computed, a.output_ids, a.num_unread, a.num_in_flight) == (4, [8, 9], 0, 0)
    scheduler.finish(a)
    assert not scheduler.has_work


def test_a_step_ahead_of_a_stop_is_ignored() -> None:
    scheduler = make()
    (a,) = add(scheduler, 3)
    first, second = plan(scheduler), plan(scheduler)
    commit(scheduler, first, 8)
    scheduler.finish(a)  # 8 was a stop token
    commit(scheduler, second, 9)
    assert (a.output_ids, a.status) == ([8], Status.FINISHED)
    assert scheduler.num_free_pages == 49


def test_a_token_in_flight_survives_preemption() -> None:
    scheduler, (a, b) = prefilled(5, 4, 4)
    for _ in range(3):
        run_step(scheduler)
    ahead = plan(scheduler)  # both fill their second page
    step = plan(scheduler)  # a's ninth token; b is preempted with a token unread
    assert (rows(step, [a]), step.preempted) == ([(0, 8, 9, True)], (b,))
    scheduler.abort(a)
    assert scheduler.plan() is None  # b must know its newest token before it resumes
    commit(scheduler, ahead, 55)
    assert (b.output_ids[-1], b.num_computed) == (55, 0)
    commit(scheduler, step, 56)
    assert rows(run_step(scheduler), [b]) == [(0, 0, 9, True)]


def test_one_preempted_to_no_avail_is_not_reported_later() -> None:
    scheduler, (a, b) = prefilled(5, 4, 4)
    a.max_length = 9
    for _ in range(3):
        run_step(scheduler)
    ahead = plan(scheduler)  # draws a's last token
    assert scheduler.plan() is None  # b wants a page, is the youngest, and alone
    assert (b.status, b.num_preemptions) == (Status.WAITING, 1)
    commit(scheduler, ahead)
    scheduler.finish(a)
    step = plan(scheduler)
    assert (step.admitted, step.preempted) == ((b,), ())
    assert scheduler.num_preemptions == 1  # but it is counted


def test_an_abort_between_plan_and_commit() -> None:
    scheduler = make()
    a, b = add(scheduler, 3, 3)
    step = plan(scheduler)
    scheduler.abort(a)
    commit(scheduler, step)
    assert (a.output_ids, a.num_computed, b.output_ids) == ([], 0, [7])
    scheduler.abort(a)  # once more does nothing
    assert rows(run_step(scheduler), [b]) == [(0, 3, 4, True)]


def test_misuse_is_caught() -> None:
    scheduler = make()
    (a,) = add(scheduler, 3, max_length=4)
    with pytest.raises(AssertionError, match="added twice: .*'r'"):
        scheduler.add(a)
    with pytest.raises(AssertionError, match="never added: .*'r'"):
        scheduler.abort(TokenSequence("r", 0, [1], 2))
    step = plan(scheduler)
    with pytest.raises(AssertionError, match=r"chunk.samples=True, token_id=None"):
        scheduler.commit(step.chunks[0], None)
    commit(scheduler, step)
    with pytest.raises(AssertionError, match="stuck: .*num_running=1"):
        scheduler.plan()  # its last token was read: the engine should have finished it
    scheduler.finish(a)
    with pytest.raises(AssertionError, match="finished twice: .*'r'"):
        scheduler.finish(a)


@pytest.mark.parametrize(("num_prompt_tokens", "max_length"), [(0, 5), (5, 5), (5, 65)])
def test_lengths_that_cannot_run(num_prompt_tokens: int, max_length: int) -> None:
    with pytest.raises(AssertionError, match=f"num_tokens={num_prompt_tokens}.*={max_length}"):
        add(make(), num_prompt_tokens, max_length=max_length)


@pytest.mark.parametrize(
    "changes",
    [
        dict(max_step_tokens=3),
        dict(max_slots=0),
        dict(num_pages=16),
        dict(max_chunk_tokens=0),
    ],
    ids=str,
)
def test_limits_that_cannot_run(changes: dict[str, int]) -> None:
    name, value = next(iter(changes.items()))
    with pytest.raises(AssertionError, match=f"{name}={value}"):
        make(**changes)


def with_prompts(scheduler: Scheduler, *prompts: list[int]) -> list[TokenSequence]:
    sequences = [TokenSequence(f"r{i}", 0, prompt, 64) for i, prompt in enumerate(prompts)]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def test_the_last_in_rank_is_preempted() -> None:
    scheduler = make(num_pages=6, max_model_len=16)
    a, b = [TokenSequence("r", i, [1, 2, 3, 4], 16, priority=-i) for i in range(2)]
    for sequence in (a, b):
        scheduler.add(sequence)
    for _ in range(5):
        run_step(scheduler)
    steps = [run_step(scheduler) for _ in range(4)]
    assert [s.preempted for s in steps if s.preempted] == [(a,)]  # older, but of lower priority
    assert b.num_preemptions == 0


def test_the_longest_known_prefix_begins_first_until_another_was_overtaken_often() -> None:
    scheduler = make(max_slots=1, prefix_caching=True, max_overtaken=2)
    known = list(range(12))
    (first,) = with_prompts(scheduler, known)
    run_step(scheduler)
    scheduler.finish(first)
    others = with_prompts(scheduler, [90] * 9, [*known, 1], [*known[:4], 91, 92], [*known, 2])
    begun = []
    while scheduler.has_work:
        (sequence,) = run_step(scheduler).admitted
        begun.append(others.index(sequence))
        scheduler.finish(sequence)
    assert begun == [1, 3, 0, 2]
    assert [s.num_cached for s in others] == [0, 12, 4, 12]


def test_one_that_waits_for_a_prefix_lets_others_pass() -> None:
    scheduler = make(prefix_caching=True, max_step_tokens=16)
    shared = list(range(24))
    a, b, c = sequences = with_prompts(scheduler, shared, [*shared, 50], [60, 61])
    step = run_step(scheduler)
    assert rows(step, sequences) == [(0, 0, 16, False)]
    step = run_step(scheduler)  # b waits for a's last pages, c does not
    assert rows(step, sequences) == [(0, 16, 24, True), (2, 0, 2, True)]
    step = run_step(scheduler)
    assert rows(step, sequences)[-1] == (1, 24, 25, True)
    assert (a.num_cached, b.num_cached, c.num_cached) == (0, 24, 0)


def test_a_partial_page_is_copied_for_the_same_prompt() -> None:
    scheduler = make(prefix_caching=True)
    prompt = list(range(11))
    a, b, c = sequences = with_prompts(scheduler, prompt, prompt, list(prompt))
    assert rows(run_step(scheduler), sequences) == [(0, 0, 11, True)]
    step = run_step(scheduler)
    # b is another continuation of a's prompt; c happens to say the same, and is not compared.
    assert rows(step, sequences) == [(0, 11, 12, True), (1, 10, 11, True), (2, 8, 11, True)]
    assert step.copies == (PageCopy(a.pages[2], b.pages[2]),)
    assert a.pages[:2] == b.pages[:2] == c.pages[:2]
    assert len({a.pages[2], b.pages[2], c.pages[2]}) == 3


def test_a_salt_keeps_partial_pages_apart() -> None:
    scheduler = make(prefix_caching=True)
    prompt = list(range(11))
    a, b = [TokenSequence("r", i, prompt, 64, root_key=bytes([i])) for i in range(2)]
    for sequence in (a, b):
        scheduler.add(sequence)
    for _ in range(2):
        assert run_step(scheduler).copies == ()
    assert not set(a.pages) & set(b.pages)


def test_after_a_reset_what_runs_names_nothing_more() -> None:
    scheduler = make(prefix_caching=True)
    (a,) = with_prompts(scheduler, list(range(8)))
    run_step(scheduler)
    scheduler.forget_prefixes()
    for _ in range(9):
        run_step(scheduler)
    scheduler.finish(a)
    (b,) = with_prompts(scheduler, [*a.tokens(0, 16), 3])
    run_step(scheduler)
    assert b.num_cached == 0


def test_a_restarted_sequence_keeps_its_rank_and_forgets_what_was_in_flight() -> None:
    scheduler = make(max_slots=1)
    a, b = add(scheduler, 3, 3)
    first = plan(scheduler)
    ahead = plan(scheduler)  # the step after it, in flight
    commit(scheduler, first)
    scheduler.abort(a)
    a.output_ids.pop()
    again = a.restarted()
    scheduler.add(again)
    commit(scheduler, ahead)
    assert (a.output_ids, again.output_ids) == ([], [])
    assert rows(run_step(scheduler), [again]) == [(0, 0, 3, True)]  # before b, which came later
    assert b.status is Status.WAITING
