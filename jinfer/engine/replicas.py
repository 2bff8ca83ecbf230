"""Several engines with the same model on chips of their own, fed from one queue."""

import time
from bisect import insort
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import jax

from jinfer.config import EngineConfig
from jinfer.engine.engine import Engine
from jinfer.engine.metrics import EngineMetrics, Load, MetricsSnapshot
from jinfer.engine.running import Request
from jinfer.errors import RequestError
from jinfer.parallel.mesh import split_devices
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt
from jinfer.request.seeds import Seeds
from jinfer.request.stop import Finish
from jinfer.schedule.scheduler import MAX_OVERTAKEN
from jinfer.startup.defaults import platform_of
from jinfer.startup.memory import check_host_tier

# Sequences that may wait in one replica: enough to refill the slots that a step frees, and few
# enough that none waits for a busy replica while another is idle.
NUM_AHEAD = 8


class Replicas:
    """Looks like one Engine. `step` dispatches to every replica, then reads them one by one.

    The output of a request does not depend on the replica, as its seed does not. Each replica has
    a prefix cache of its own.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Loads one engine after the other; raises the errors of `jinfer.startup.load.load`."""
        if jax.process_count() > 1:
            raise NotImplementedError(
                "data_parallel_size must be 1 where several hosts run one model; got "
                f"data_parallel_size={config.data_parallel_size} on {jax.process_count()} "
                "processes. Run a job per replica."
            )
        groups = split_devices(
            jax.devices(),
            data_parallel_size=config.data_parallel_size,
            tensor_parallel_size=config.tensor_parallel_size,
        )
        check_host_tier(config, platform_of(groups[0][0]))  # for all replicas together
        self._metrics = EngineMetrics()
        self._queue: list[_Entry] = []  # in order
        self._entry_of: dict[str, _Entry] = {}
        self._arrivals: deque[_Entry] = deque()  # in order of arrival; some may have left the queue
        self._num_overtaken = 0  # later requests that left before the oldest waiting one
        self._home: dict[str, Engine] = {}  # the replica of each request that left the queue
        self._num_added = 0
        self._seeds = Seeds(config.seed)
        self.engines: list[Engine] = []
        own = config
        if config.kv_offloading_size:
            share = config.kv_offloading_size / config.data_parallel_size
            own = replace(own, kv_offloading_size=share)
        with ExitStack() as on_failure:
            for devices in groups:
                engine = Engine(own, devices=devices, metrics=self._metrics)
                on_failure.callback(engine.close)
                self.engines.append(engine)
                # The first replica decides by its free memory: a request must fit all or none.
                own = replace(own, max_model_len=engine.plan.max_model_len)
            on_failure.pop_all()
        first = self.engines[0]
        self.config, self.model, self.plan = config, first.model, first.plan
        self.tokenizer, self.defaults = first.tokenizer, first.defaults

    @property
    def has_work(self) -> bool:
        return bool(self._queue) or any(engine.has_work for engine in self.engines)

    @property
    def num_late_compiles(self) -> int:
        """Compilations since warm-up; anything but 0 is a bug."""
        return sum(engine.num_late_compiles for engine in self.engines)

    def metrics(self) -> MetricsSnapshot:
        """Returns the sum over the replicas, now and since the start; any thread may call it."""
        num_queued = sum(len(entry.request.completions) for entry in list(self._queue))
        load = Load(num_running=0, num_waiting=num_queued, num_pages_used=0, num_pages=0)
        return self._metrics.snapshot(sum((engine.load for engine in self.engines), load))

    def require_alive(self) -> None:
        """Raises RuntimeError if a replica is closed or broken."""
        for engine in self.engines:
            engine.require_alive()

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> Request:
        """As `Engine.prepare`."""
        return self.engines[0].prepare(request_id, prompt, params, priority)

    def add(self, request: Request) -> None:
        """As `Engine.add`; a replica takes the request once it has room."""
        self.require_alive()
        if request.request_id in self._home or request.request_id in self._entry_of:
            raise RequestError(
                f"a request id must be unique; got request_id={request.request_id!r} twice."
            )
        if request.seed is None:  # drawn here, so that it does not depend on the replica
            request.seed = self._seeds.draw()
        self._num_added += 1
        entry = _Entry(request.priority, self._num_added, request)
        insort(self._queue, entry)
        self._entry_of[request.request_id] = entry
        self._arrivals.append(entry)

    def abort(self, request_id: str) -> Request | None:
        """As `Engine.abort`."""
        if entry := self._entry_of.pop(request_id, None):
            self._queue.remove(entry)
            metrics = entry.request.metrics
            metrics.finished_time = time.monotonic()
            self._metrics.finished(
                str(Finish.ABORT), e2e_s=metrics.finished_time - metrics.arrival_time, tpot_s=None
            )
            entry.request.abort()
            return entry.request
        engine = self._home.pop(request_id, None)
        return None if engine is None else engine.abort(request_id)

    def step(self) -> list[Request]:
        """Steps every replica that has work; returns and raises as `Engine.step`."""
        self.require_alive()
        self._feed()
        busy = [engine for engine in self.engines if engine.has_work]
        sent = [(engine, engine.dispatch()) for engine in busy]
        advanced = [request for engine, pending in sent for request in engine.read(pending)]
        for request in advanced:
            if request.finished:
                self._home.pop(request.request_id, None)
        return advanced

    def reset_prefix_cache(self) -> None:
        """As `Engine.reset_prefix_cache`, in every replica."""
        for engine in self.engines:
            engine.reset_prefix_cache()

    def close(self) -> None:
        """As `Engine.close`; aborts the waiting requests too."""
        with ExitStack() as closing:  # close all, even if one raises
            for engine in self.engines:
                closing.callback(engine.close)
            for request_id in list(self._entry_of):
                self.abort(request_id)

    def _feed(self) -> None:
        """Hands the first of the queue to the least busy replica, while one has room."""
        while self._queue:
            engine = min(self.engines, key=_num_sequences)
            if _num_sequences(engine) >= self.plan.max_slots + NUM_AHEAD:
                return
            self._hand_over(self._take(), engine)

    def _take(self) -> "_Entry":
        """Removes the first of the queue, or the oldest if it was overtaken too often."""
        while self._entry_of.get(self._arrivals[0].request.request_id) is not self._arrivals[0]:
            self._arrivals.popleft()
            self._num_overtaken = 0
        oldest, first = self._arrivals[0], self._queue[0]
        if first is not oldest and self._num_overtaken == MAX_OVERTAKEN:
            first = oldest
        self._num_overtaken += first is not oldest
        self._queue.remove(first)
        return first

    def _hand_over(self, entry: "_Entry", engine: Engine) -> None:
        engine.add(entry.request)
        del self._entry_of[entry.request.request_id]
        self._home[entry.request.request_id] = engine


class _Entry(NamedTuple):
    """A request in the queue; no two share both numbers, so the numbers alone set the order."""

    priority: int
    arrival: int
    request: Request


def _num_sequences(engine: Engine) -> int:
    return engine.load.num_running + engine.load.num_waiting
