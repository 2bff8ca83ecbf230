"""Stress mode: workloads played on a real engine of the shipped model, with faults injected.

A workload is a list of requests with the turn of the loop at which each arrives. A `Player` runs
one on an engine whose pool is too small for it, disturbs it by its faults, and holds every answer
against that of the same requests undisturbed: uncached, in a pool with room for all. Used by
`test_stress.py`; a longer run is `pytest -m slow tests/test_stress.py`.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from engine_runs import logprobs_of, tokens_of

from jinfer.config import EngineConfig
from jinfer.engine.engine import Engine
from jinfer.engine.running import Request
from jinfer.errors import RequestError
from jinfer.request.output import RequestOutput
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt
from jinfer.schedule.plan_builder import PlanBuilder
from jinfer.shipped import DEFAULT_MODEL

PAGE_SIZE = 8
MAX_MODEL_LEN = 96
# Sums of float32 in another order: alone or in a batch, with nothing cached or preempted, 10,000
# tokens differ by up to 8e-6, so among many times as many a few differ by more than this.
LOGPROB_ERROR = 1e-5
STOPS = ["the", ".", "and "]
BAD_WORDS = ("he", "in", "as", "o")  # words that the model would write often


def stress_engine(**changes: Any) -> Engine:
    """The shipped model; a compilation after warm-up is an error."""
    settings = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": MAX_MODEL_LEN,
        "page_size": PAGE_SIZE,
        "late_compile": "error",
        "progress": False,
    }
    return Engine(EngineConfig(model=DEFAULT_MODEL, **{**settings, **changes}))


def cramped_engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Pages for one longest sequence, and room for twice as many in host memory."""
    # Fetching from the first page on, whatever this machine's bandwidth is today.
    monkeypatch.setattr("jinfer.startup.load.break_even_pages", lambda plan, runner: 1)
    num_pages = MAX_MODEL_LEN // PAGE_SIZE
    page_gib = 6 * 2 * 2 * 64 * PAGE_SIZE * 4 / 2**30  # 6 layers, keys and values, 2 heads of 64
    return stress_engine(num_pages=num_pages + 1, kv_offloading_size=2 * num_pages * page_gib)


@dataclass(frozen=True)
class Job:
    """One request of a workload."""

    turn: int  # of the loop, at which it arrives
    prompt: Prompt
    params: SamplingParams
    priority: int


@dataclass(frozen=True)
class Faults:
    """How likely each is, per turn."""

    preempt: float = 0.0  # the running one that is last in rank loses its pages
    abort: float = 0.0  # a request is ended by its caller
    fail: float = 0.0  # handling a request's next token raises
    allocate: float = 0.0  # per allocation: no pages to be had


def random_workload(seed: int, num_jobs: int = 10) -> list[Job]:
    """Prompts that begin alike or do not, several continuations, stops, salts and priorities."""
    rng = random.Random(seed)
    families = [[rng.randrange(3, 1000) for _ in range(48)] for _ in range(2)]
    jobs, turn = [], 0
    for number in range(num_jobs):
        turn += rng.choice((0, 0, 1, 3, 9))
        begin = rng.choice(families)[: rng.choice((0, 7, 8, 24, 33, 48))]
        token_ids = tuple(begin + [rng.randrange(3, 1000) for _ in range(rng.randint(1, 9))])
        params = SamplingParams(
            max_tokens=rng.randint(28, MAX_MODEL_LEN - len(token_ids)),
            temperature=rng.choice((0.0, 0.8)),
            seed=seed * 100 + number,
            n=rng.choice((1, 1, 1, 2, 3)),
            stop=STOPS[: rng.choice((0, 0, 0, 0, 1, 3))],
            bad_words=BAD_WORDS if number % 4 == 1 else (),
            frequency_penalty=rng.choice((0.0, 0.4)),
            logprobs=0,
            prompt_logprobs=rng.choice((None, None, None, 1)),
            ignore_eos=rng.random() < 0.9,
        )
        prompt = Prompt(text=None, token_ids=token_ids, cache_salt=rng.choice(("", "", "tenant")))
        jobs.append(Job(turn, prompt, params, rng.choice((0, 0, -1, 1))))
    return jobs


class Broken:
    """Stands where a request's stop strings are looked for."""

    def feed(self, *_: Any, **__: Any) -> Any:
        raise RequestError("injected")

    def flush(self) -> str:
        return ""


class Player:
    """Plays one workload; afterwards `aborted` and `failed` say which requests were hit."""

    def __init__(self, engine: Engine, faults: Faults, seed: int = 0) -> None:
        self.engine, self.faults = engine, faults
        self.rng = random.Random(seed)
        self.requests: list[Request] = []
        self.aborted: set[str] = set()
        self.failed: set[str] = set()
        self.num_refused = 0  # allocations
        self.num_restored = self.num_copied = 0  # pages, from host memory and on write
        self.logprob_errors: list[float] = []  # against the undisturbed run

    @property
    def num_preemptions(self) -> int:
        return sum(c.sequence.num_preemptions for r in self.requests for c in r.completions)

    def play(self, workload: Sequence[Job], abort_at: tuple[int, int] | None = None) -> None:
        """Turns the loop until all is done; `abort_at` = (turn, place of the one to abort)."""
        turn = 0
        with self._failing_allocations():
            while len(self.requests) < len(workload) or self.engine.has_work:
                while len(self.requests) < len(workload):
                    job = workload[len(self.requests)]
                    if job.turn > turn:
                        break
                    self._add(job)
                if abort_at is not None and turn == abort_at[0]:
                    self._abort(self.requests[abort_at[1]])
                self._disturb()
                self.engine.step()
                self._count_moves()
                turn += 1
                assert turn < 5000, "starved"
        self.num_turns = turn
        assert self.engine.scheduler.num_free_pages == self.engine.plan.num_pages - 1
        assert self.engine.num_late_compiles == 0

    def check(self, want: Sequence[RequestOutput]) -> None:
        """Every answer is that of the undisturbed run, or the beginning of it where it was hit."""
        for request, whole in zip(self.requests, want, strict=True):
            got = request.output()
            assert got.finished
            if request.request_id in self.failed and got.error is not None:
                assert str(got.error) == "injected"
            elif request.request_id not in self.aborted:
                assert got.error is None and tokens_of(got) == tokens_of(whole)
                assert [o.text for o in got.outputs] == [o.text for o in whole.outputs]
                assert [o.finish_reason for o in got.outputs] == [
                    o.finish_reason for o in whole.outputs
                ]
            for index, tokens in enumerate(tokens_of(got)):
                assert tokens == tokens_of(whole)[index][: len(tokens)]
                near, far = logprobs_of(got, index), logprobs_of(whole, index)[: len(tokens)]
                far = far[: len(near)]  # a failed request has one token more than logprobs
                np.testing.assert_allclose(near, far, atol=2 * LOGPROB_ERROR, rtol=0)
                self.logprob_errors += np.abs(np.subtract(near, far)).tolist()

    def _add(self, job: Job) -> None:
        number = str(len(self.requests))
        request = self.engine.prepare(number, job.prompt, job.params, job.priority)
        self.engine.add(request)
        self.requests.append(request)

    def _abort(self, request: Request) -> None:
        if not request.finished:
            self.engine.abort(request.request_id)
            self.aborted.add(request.request_id)

    def _count_moves(self) -> None:
        if self.engine._pending is not None:  # what this turn dispatched
            self.num_restored += len(self.engine._pending.plan.restores)
            self.num_copied += len(self.engine._pending.plan.copies)

    def _disturb(self) -> None:
        alive = [request for request in self.requests if not request.finished]
        scheduler = self.engine.scheduler
        if scheduler.num_running and self.rng.random() < self.faults.preempt:
            scheduler._preempt_last(PlanBuilder(0, 0))
        if alive and self.rng.random() < self.faults.abort:
            self._abort(self.rng.choice(alive))
        if alive and self.rng.random() < self.faults.fail:
            request = self.rng.choice(alive)
            self.rng.choice(request.completions)._stops = Broken()  # pyright: ignore
            self.failed.add(request.request_id)

    @contextmanager
    def _failing_allocations(self) -> Iterator[None]:
        """Running rows are refused pages at times, as long as there is somebody to take from."""
        scheduler, pool = self.engine.scheduler, self.engine.scheduler._pool
        allocate, schedule_running = pool.allocate, scheduler._schedule_running

        def refusing(num_pages: int) -> Any:
            if num_pages and scheduler.num_running > 1:
                if self.rng.random() < self.faults.allocate:
                    self.num_refused += 1
                    return None
            return allocate(num_pages)

        def schedule(builder: PlanBuilder) -> None:
            pool.allocate = refusing
            schedule_running(builder)
            pool.allocate = allocate

        scheduler._schedule_running = schedule
        try:
            yield
        finally:
            scheduler._schedule_running = schedule_running


def undisturbed(engine: Engine, workload: Sequence[Job]) -> list[RequestOutput]:
    """The answers of a workload on an engine that nothing disturbs."""
    player = Player(engine, Faults())
    player.play(workload)
    assert player.num_preemptions == 0
    return [request.output() for request in player.requests]
