"""What happens around a request does not change its answer: see `stress.py`."""

import asyncio
from collections.abc import Iterator

import pytest
from stress import (
    LOGPROB_ERROR,
    Broken,
    Faults,
    Job,
    Player,
    cramped_engine,
    random_workload,
    stress_engine,
    undisturbed,
)

from jinfer.async_llm import AsyncLLM
from jinfer.engine.engine import Engine
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt

ALL_FAULTS = Faults(preempt=0.05, abort=0.02, fail=0.02, allocate=0.2)


@pytest.fixture(scope="module")
def reference() -> Iterator[Engine]:
    engine = stress_engine(enable_prefix_caching=False, max_decode_steps=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def cramped() -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = cramped_engine(monkeypatch)
    yield engine
    engine.close()


def play(engine: Engine, reference: Engine, faults: Faults, seed: int) -> Player:
    workload = random_workload(seed)
    player = Player(engine, faults, seed)
    player.play(workload)
    player.check(undisturbed(reference, workload))
    return player


def preempted_equals_undisturbed(engine: Engine, reference: Engine, seeds: range) -> None:
    num_preempted_workloads = num_restored = num_copied = 0
    errors: list[float] = []
    for seed in seeds:
        player = play(engine, reference, Faults(), seed)
        num_preempted_workloads += player.num_preemptions > 0
        num_restored += player.num_restored
        num_copied += player.num_copied
        errors += player.logprob_errors
        if seed % 5 == 0:
            engine.reset_prefix_cache()
    # A rare workload ends before any of it must be preempted.
    assert num_preempted_workloads >= len(seeds) - len(seeds) // 100
    assert num_restored > 0 and num_copied > 0
    check_rare(errors)


def check_rare(errors: list[float]) -> None:
    """At most one logprob of 10,000, or a single one, is further off than rounding explains."""
    print(f"{len(errors)} logprobs, worst {max(errors):.2e}")
    assert sum(error > LOGPROB_ERROR for error in errors) <= max(1, len(errors) // 10_000)


def test_preempted_equals_undisturbed(cramped: Engine, reference: Engine) -> None:
    preempted_equals_undisturbed(cramped, reference, range(4))


@pytest.mark.slow
def test_preempted_equals_undisturbed_over_many_workloads(
    cramped: Engine, reference: Engine
) -> None:
    preempted_equals_undisturbed(cramped, reference, range(4, 106))


def disturbed(engine: Engine, reference: Engine, seeds: range) -> None:
    players = [play(engine, reference, ALL_FAULTS, seed) for seed in seeds]
    assert sum(p.num_preemptions for p in players) > len(seeds)
    assert sum(p.num_refused for p in players) > len(seeds) // 2
    assert sum(len(p.aborted) for p in players) and sum(len(p.failed) for p in players)
    assert sum(p.num_restored for p in players) and sum(p.num_copied for p in players)
    check_rare([error for p in players for error in p.logprob_errors])
    errors = [r for p in players for r in p.requests if r.error is not None]
    assert errors and sum(len(p.requests) for p in players) > 2 * len(errors)


def test_faults_around_a_request_do_not_change_it(cramped: Engine, reference: Engine) -> None:
    disturbed(cramped, reference, range(300, 304))


@pytest.mark.slow
def test_faults_over_many_workloads(cramped: Engine, reference: Engine) -> None:
    disturbed(cramped, reference, range(304, 364))


def test_a_request_that_cannot_even_be_ended_ends(cramped: Engine) -> None:
    request, other = [
        cramped.prepare(
            name, Prompt(None, (5, 6, 7)), SamplingParams(max_tokens=60, ignore_eos=True)
        )
        for name in ("broken", "whole")
    ]
    for each in (request, other):
        cramped.add(each)
    for _ in range(4):
        cramped.step()
    request.completions[0]._stops = Broken()  # pyright: ignore
    assert cramped.abort("broken") is request
    assert request.finished and str(request.output().error) == "injected"
    while cramped.has_work:
        cramped.step()
    assert other.finished and other.error is None
    assert cramped.scheduler.num_free_pages == cramped.plan.num_pages - 1


def scripted(num_tokens: int) -> list[Job]:
    """Three requests that begin alike, one with two continuations; too many pages for the pool."""
    prompt = tuple(range(10, 30))
    asked = dict(temperature=0.0, ignore_eos=True, logprobs=0)
    return [
        Job(0, Prompt(None, prompt), SamplingParams(max_tokens=num_tokens, **asked), 0),
        Job(1, Prompt(None, prompt), SamplingParams(max_tokens=num_tokens, n=2, **asked), 0),
        Job(2, Prompt(None, (*prompt, 5)), SamplingParams(max_tokens=num_tokens, **asked), -1),
    ]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_an_abort_at_each_possible_point(cramped: Engine, reference: Engine, victim: int) -> None:
    workload = scripted(24)
    want = undisturbed(reference, workload)
    turn, num_aborted = workload[victim].turn, 0
    while True:
        cramped.reset_prefix_cache()
        player = Player(cramped, Faults())
        player.play(workload, abort_at=(turn, victim))
        player.check(want)
        if turn >= player.num_turns:
            break
        num_aborted += len(player.aborted)
        turn += 1
    assert num_aborted > 5


async def test_a_slow_consumer_holds_up_nobody() -> None:
    settings = dict(max_num_seqs=2, max_num_batched_tokens=2, max_decode_steps=1, progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    async with AsyncLLM(**settings) as llm:
        ended: list[str] = []

        async def consume(name: str, wait_s: float) -> str:
            text = ""
            async for output in llm.generate("Once upon a time", params, name):
                text = output.outputs[0].text
                await asyncio.sleep(wait_s)
            ended.append(name)
            return text

        slow, fast = await asyncio.gather(consume("slow", 0.5), consume("fast", 0.0))
    assert slow == fast != "" and ended == ["fast", "slow"]
