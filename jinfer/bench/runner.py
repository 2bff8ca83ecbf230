"""Runs a workload on an engine and records it."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import jax.numpy as jnp

from jinfer.bench.device_log import DeviceLog, DeviceTimes, Span, device_times
from jinfer.bench.roofline import Costs, StepWork
from jinfer.bench.workload import Job
from jinfer.engine.replicas import Replicas
from jinfer.engine.running import Request
from jinfer.llm import LLM
from jinfer.parallel.model_shards import chip_shard, padded_model
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt


@dataclass(slots=True)
class Served:
    """The times of one request, in seconds since its arrival; a token counts once on the host."""

    num_input_tokens: int
    # Of `time.monotonic()`: as planned by the workload, or when it found a place among the most
    # concurrent requests.
    arrived_s: float
    queue_s: float = 0.0
    token_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_s[0]

    @property
    def e2e_s(self) -> float:
        return self.token_s[-1]

    @property
    def tpot_s(self) -> float | None:
        """None for a single token."""
        num_more = len(self.token_s) - 1
        return (self.e2e_s - self.ttft_s) / num_more if num_more else None

    @property
    def itl_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


@dataclass(slots=True)
class Recording:
    """All records of one run."""

    served: list[Served]
    elapsed_s: float
    idle_s: float  # part of elapsed_s without a request
    device: DeviceTimes
    steps: list[StepWork]
    num_places: int
    num_tokens: int
    kv_waste: float  # mean fraction of allocated cells that are empty
    num_late_compiles: int
    num_preemptions: int
    num_cached_tokens: int


def require_one_replica(data_parallel_size: int) -> None:
    """Raises NotImplementedError for replicas: a benchmark records one engine's steps."""
    if data_parallel_size > 1:
        raise NotImplementedError(
            "a benchmark watches the steps of one replica; got data_parallel_size="
            f"{data_parallel_size}. Leave it out."
        )


def run_jobs(
    llm: LLM, jobs: Sequence[Job], *, streams: bool, max_concurrency: int | None = None
) -> Recording:
    """Adds each job at its arrival and steps the engine until all jobs are answered.

    Args:
      llm: without other requests.
      jobs: with arrivals after the start.
      streams: deliver tokens one by one, as a server does.
      max_concurrency: a job waits outside the engine while so many are unanswered, and its times
        count from its end of waiting; None = no limit.
    """
    engine = llm.engine
    require_one_replica(engine.config.data_parallel_size)
    assert not isinstance(engine, Replicas)  # data_parallel_size is 1
    plan = engine.plan
    size = plan.tensor_parallel_size
    costs = Costs.of(  # for one chip, since the ceilings are one chip's
        chip_shard(padded_model(engine.model, size), size),
        itemsize=jnp.dtype(plan.dtype).itemsize,
        kv_bytes=plan.page_bytes // plan.page_size,
    )
    log = DeviceLog(costs)
    before, num_late = engine.metrics(), engine.num_late_compiles
    engine.observer = log
    loop = _Loop(llm, jobs, streams, max_concurrency)
    try:
        loop.run()
    finally:
        engine.observer = None
        dispatches = log.close()
    after = engine.metrics()
    return Recording(
        served=loop.served,
        elapsed_s=loop.end_s - loop.start_s,
        idle_s=sum(b - a for a, b in loop.without_work),
        device=device_times(dispatches, start_s=loop.start_s, without_work=loop.without_work),
        steps=log.steps,
        num_places=log.num_places,
        num_tokens=log.num_tokens,
        kv_waste=loop.num_unfilled / max(1, loop.num_allocated),
        num_late_compiles=engine.num_late_compiles - num_late,
        num_preemptions=after.num_preemptions - before.num_preemptions,
        num_cached_tokens=after.num_cached_tokens - before.num_cached_tokens,
    )


class _Loop:
    """Steps the engine and records its requests."""

    _ids = count()

    def __init__(
        self, llm: LLM, jobs: Sequence[Job], streams: bool, max_concurrency: int | None
    ) -> None:
        self._llm, self._streams = llm, streams
        self._max_concurrency = max_concurrency or len(jobs)
        self._engine = llm.engine
        self._waiting = deque(sorted(jobs, key=lambda job: job.arrival_s))
        self._live: dict[Request, Served] = {}
        self.served: list[Served] = []
        self.without_work: list[Span] = []
        self.num_allocated = self.num_unfilled = 0  # cells of the pool, sums over steps
        self.start_s = self.end_s = 0.0
        self._is_held = False  # whether a due job waits for a place

    def run(self) -> None:
        self.start_s = time.monotonic()
        while self._waiting or self._live:
            self._send_due()
            if self._live:
                self._step()
            else:
                self._sleep()
        self.end_s = time.monotonic()
        while self._engine.has_work:  # a last dispatch without a waiting request
            self._engine.step()

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._waiting and self.start_s + self._waiting[0].arrival_s <= now:
            if len(self._live) >= self._max_concurrency:
                self._is_held = True
                return
            job = self._waiting.popleft()
            params = SamplingParams(
                temperature=0.0, max_tokens=job.num_output_tokens, ignore_eos=True
            )
            prompt = Prompt(text=None, token_ids=job.prompt_ids)
            request = self._llm.prepare(prompt, params, f"bench-{next(self._ids)}")
            request.streams = self._streams
            self._engine.add(request)
            # The first job that was held back, and those behind it, arrive when a place is free.
            arrived_s = now if self._is_held else self.start_s + job.arrival_s
            self._live[request] = Served(len(job.prompt_ids), arrived_s)
        self._is_held = False

    def _sleep(self) -> None:
        begun_s = time.monotonic()
        due_s = self.start_s + self._waiting[0].arrival_s
        time.sleep(max(0.0, due_s - begun_s))
        self.without_work.append((begun_s, time.monotonic()))

    def _step(self) -> None:
        advanced = self._engine.step()
        now = time.monotonic()
        self._note_cells()
        for request in advanced:
            if request.error is not None:
                raise request.error
            served = self._live.get(request)
            if served is None:
                continue
            num_new = request.metrics.num_output_tokens - len(served.token_s)
            served.token_s += [now - served.arrived_s] * num_new
            if request.finished:
                scheduled_s = request.metrics.first_scheduled_time
                assert scheduled_s is not None, f"answered unscheduled: {request.request_id=}"
                served.queue_s = scheduled_s - served.arrived_s
                self.served.append(self._live.pop(request))

    def _note_cells(self) -> None:
        page_size = self._engine.plan.page_size
        for request in self._live:
            for completion in request.completions:
                sequence = completion.sequence
                num_cells = len(sequence.pages) * page_size
                self.num_allocated += num_cells
                self.num_unfilled += max(0, num_cells - sequence.num_scheduled)
