"""Steps that keep to targets of time, on a clock that only the tests turn."""

import math
from dataclasses import dataclass, field

import pytest

from jinfer.schedule.capacity import bucket_for
from jinfer.schedule.pace import Awaited, Pace
from jinfer.schedule.scheduler import Scheduler
from jinfer.schedule.sequence import TokenSequence
from jinfer.schedule.step_times import StepTimes

SIZES = (1, 8, 16, 32, 64)
FIXED_S, TOKEN_S = 0.010, 0.001  # what a step takes: 74 ms for 64 tokens


def step_s(size: int) -> float:
    return FIXED_S + TOKEN_S * size


def make_pace(**targets: float) -> Pace:
    pace = Pace(SIZES, **targets)
    for size in SIZES:
        pace.times.observe(size, step_s(size))
    return pace


def test_a_step_is_filled_only_where_its_cost_is_known() -> None:
    assert [Pace((1, 8, 32)).fill(n) for n in (1, 9, 32)] == [1, 9, 32]
    assert [Pace((1, 8, 32), step_cost_tokens=2).fill(n) for n in (1, 9, 32)] == [1, 8, 32]


def test_a_line_through_what_was_measured() -> None:
    times = StepTimes()
    assert times.predict(8) == 0.0
    times.observe(8, step_s(8))
    assert times.predict(64) == pytest.approx(step_s(8))  # one size says nothing of others
    times.observe(32, step_s(32))
    assert times.predict(64) == pytest.approx(step_s(64))
    for _ in range(1000):  # the same again and again does not make it forget the other
        times.observe(8, step_s(8))
    assert times.predict(64) == pytest.approx(step_s(64))
    for size in 8, 32:
        for _ in range(100):  # it slowed down
            times.observe(size, 2 * step_s(size))
    assert times.predict(64) == pytest.approx(2 * step_s(64), rel=1e-3)


def test_larger_steps_are_never_thought_to_be_faster() -> None:
    times = StepTimes()
    times.observe(8, 0.3)
    times.observe(32, 0.1)
    assert times.predict(64) == times.predict(1) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("tpot_target_s", "num_decodes", "size"),
    [
        (0.045, 0, 64),  # nobody waits for a further token
        (0.045, 3, 32),
        (0.042, 3, 32),
        (0.041, 3, 16),
        (1.0, 3, 64),
        (0.001, 3, 8),  # out of reach: prompts get on all the same
        (0.001, 8, 16),
        (0.001, 64, 64),
    ],
)
def test_steps_within_the_target(tpot_target_s: float, num_decodes: int, size: int) -> None:
    pace = make_pace(tpot_target_s=tpot_target_s)
    assert pace.most_tokens(num_decodes, [Awaited(100, math.inf)], 5.0) == size


def test_nothing_is_limited_before_a_step_was_seen() -> None:
    pace = Pace(SIZES, ttft_target_s=1.0, tpot_target_s=1e-6)
    assert pace.most_tokens(3, [Awaited(100, 6.0)], 5.0) == 64
    assert pace.most_steps(8, 32) == 32


@pytest.mark.parametrize(
    ("room_s", "size"),
    [
        (0.34, 16),  # 100 tokens beside 3 that decode: eight steps of 16 take 208 ms
        (0.20, 32),  # four of 32, 168 ms
        (0.15, 64),  # two of 64, 148 ms
        (0.14, 16),  # too late in any case
        (math.inf, 16),
    ],
)
def test_a_first_token_goes_before_further_ones_if_that_helps_it(room_s: float, size: int) -> None:
    pace = make_pace(ttft_target_s=1.0, tpot_target_s=0.030)
    assert pace.most_tokens(3, [Awaited(100, 5.0 + room_s)], 5.0) == size


def test_those_in_line_before_count() -> None:
    pace = make_pace(ttft_target_s=1.0, tpot_target_s=0.030)
    alone, before = Awaited(100, 5.2), Awaited(20, math.inf)
    assert pace.most_tokens(3, [alone, before], 5.0) == 32
    assert pace.most_tokens(3, [before, alone], 5.0) == 64


def test_a_dispatch_of_several_steps_is_a_quarter_of_the_time_to_a_first_token() -> None:
    assert make_pace(ttft_target_s=0.8).most_steps(8, 32) == 11  # of 18 ms
    assert make_pace(ttft_target_s=0.01).most_steps(8, 32) == 1
    assert make_pace(ttft_target_s=9.0).most_steps(8, 32) == 32
    assert make_pace(tpot_target_s=0.01).most_steps(8, 32) == 32


@dataclass
class Seen:
    """When a request came and when its tokens did."""

    arrival_s: float
    token_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.arrival_s

    @property
    def longest_gap_s(self) -> float:
        return max(b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False))


def serve(pace: Pace, arrivals: list[tuple[float, int, int]], *, max_slots: int = 8) -> list[Seen]:
    """Plays requests (when, tokens of prompt, tokens of answer) to a scheduler and its device."""
    scheduler = Scheduler(
        max_slots=max_slots, max_step_tokens=64, page_size=4, num_pages=5000, max_model_len=1024,
        max_overtaken=16, pace=pace,
    )  # fmt: skip
    now, coming = 0.0, sorted(arrivals)
    seen: dict[TokenSequence, Seen] = {}
    while coming or scheduler.has_work:
        while coming and coming[0][0] <= now:
            arrival_s, num_prompt, num_output = coming.pop(0)
            sequence = TokenSequence("r", 0, [7] * num_prompt, num_prompt + num_output)
            sequence.arrival_s = arrival_s
            seen[sequence] = Seen(arrival_s)
            scheduler.add(sequence)
        step = scheduler.plan(now_s=now)
        if step is None:
            now = coming[0][0]
            continue
        size = bucket_for(SIZES, step.num_tokens)
        now += step_s(size)
        pace.times.observe(size, step_s(size))
        for chunk in step.chunks:
            scheduler.commit(chunk, 7 if chunk.samples else None)
            if chunk.samples:
                seen[chunk.sequence].token_s.append(now)
                if chunk.sequence.num_tokens == chunk.sequence.max_length:
                    scheduler.finish(chunk.sequence)
    return list(seen.values())


# Two answer while a long prompt comes.
LONG_PROMPT = [(0.0, 4, 80), (0.0, 4, 80), (0.2, 500, 4)]


def test_a_long_prompt_does_not_stall_those_that_decode() -> None:
    free = serve(make_pace(), LONG_PROMPT)
    held = serve(make_pace(tpot_target_s=0.030), LONG_PROMPT)
    assert max(s.longest_gap_s for s in free[:2]) == pytest.approx(step_s(64))
    assert max(s.longest_gap_s for s in held[:2]) == pytest.approx(step_s(16))
    assert free[2].ttft_s < held[2].ttft_s


def test_where_both_targets_clash_the_first_token_is_in_time() -> None:
    free = serve(make_pace(), LONG_PROMPT)[2].ttft_s
    held = serve(make_pace(tpot_target_s=0.030), LONG_PROMPT)[2].ttft_s
    target_s = (free + held) / 2
    both = serve(make_pace(tpot_target_s=0.030, ttft_target_s=target_s), LONG_PROMPT)
    assert free < both[2].ttft_s <= target_s < held
    # Not in its reach: the others are spared.
    hopeless = serve(make_pace(tpot_target_s=0.030, ttft_target_s=0.9 * free), LONG_PROMPT)
    assert max(s.longest_gap_s for s in hopeless[:2]) == pytest.approx(step_s(16))


def test_under_overload_those_that_can_be_in_time_are() -> None:
    # A prompt of 64 takes 74 ms and then a row; one comes every 50 ms.
    arrivals = [(0.05 * i, 64, 2) for i in range(200)]
    target_s = 0.5
    shares = [
        sum(s.ttft_s <= target_s for s in serve(pace, arrivals)) / len(arrivals)
        for pace in (make_pace(), make_pace(ttft_target_s=target_s))
    ]
    assert shares[0] < 0.2  # first come, first served: everybody waits for everybody
    assert shares[1] > 0.5


def test_those_that_are_late_are_served_all_the_same() -> None:
    arrivals = [(0.05 * i, 64, 2) for i in range(100)]
    seen = serve(make_pace(ttft_target_s=0.01), arrivals)  # nobody can
    assert all(len(s.token_s) == 2 for s in seen)
    order = [s.token_s[0] for s in seen]
    assert order == sorted(order)  # all late: first come, first served
    mixed = serve(make_pace(ttft_target_s=0.3), arrivals)
    assert all(len(s.token_s) == 2 for s in mixed)


def test_a_late_one_is_overtaken_only_so_often() -> None:
    pace = make_pace(ttft_target_s=0.3)
    # The first cannot be in time; short ones that can come for ever.
    arrivals = [(0.0, 900, 2), *((0.04 * i, 16, 2) for i in range(300))]
    first = serve(pace, arrivals, max_slots=2)[0]
    assert first.token_s[0] < 0.04 * 300
