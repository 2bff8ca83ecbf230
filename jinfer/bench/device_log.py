"""Observes an engine's steps: when the device had work, and which."""

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import jax

from jinfer.bench.roofline import Costs, StepWork
from jinfer.schedule.plan import Chunk

_SWITCH_S = 2e-4
Span = tuple[float, float]  # start and end, in seconds of `time.monotonic()`


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTimes:
    """The device's share of a run's time."""

    busy_s: float
    waited_s: float  # with requests, but before the host sent the next step


class DeviceLog:
    """An `Observer` whose own thread records the end of each dispatch.

    The device runs dispatches in order, so one begins when it was sent or when the last one ended,
    whichever is later. It was sent when the call returned: the call's own time is the host's. If
    the call itself does the work, as XLA does with small programs on a CPU, the output is ready on
    return, and the dispatch began with the call.

    Meanwhile Python switches threads more often: the log's thread then sees the end of a dispatch
    within _SWITCH_S. The default 5 ms would count as the device's work.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.steps: list[StepWork] = []
        self.num_places = self.num_tokens = 0  # computed with padding, and without
        self._dispatches: list[Span] = []  # sent, done
        self._sent: SimpleQueue[tuple[float, float, Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="jinfer-bench-log", daemon=True)
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._thread.start()

    def dispatched(self, start_s: float, output: Any) -> None:
        returned_s = time.monotonic()
        array = jax.tree.leaves(output)[0]
        is_done = array.is_ready()
        self._sent.put((start_s, returned_s, None) if is_done else (returned_s, 0.0, array))

    def read(self, chunks: Sequence[Chunk], num_places: int) -> None:
        self.num_places += num_places
        self.num_tokens += sum(chunk.num_tokens for chunk in chunks)
        self.steps.append(self._costs.step(chunks))

    def close(self) -> list[Span]:
        """Ends the thread; returns the times at which each dispatch was sent and done."""
        self._sent.put(None)
        self._thread.join()
        sys.setswitchinterval(self._switch_s)
        return self._dispatches

    def _watch(self) -> None:
        while (sent := self._sent.get()) is not None:
            sent_s, done_s, array = sent
            if array is not None:
                array.block_until_ready()
                done_s = time.monotonic()
            self._dispatches.append((sent_s, done_s))


def device_times(
    dispatches: Sequence[Span], *, start_s: float, without_work: Sequence[Span]
) -> DeviceTimes:
    """Sums up the time in which the device computed, and in which it waited for the host.

    Args:
      dispatches: the times at which each was sent and done, in order.
      start_s: time of the first request.
      without_work: times without requests, which do not count as waiting.
    """
    busy_s = waited_s = 0.0
    free_s = start_s  # the device has been idle since then
    for sent_s, done_s in dispatches:
        begun_s = max(sent_s, free_s)
        idle_s = sum(max(0.0, min(begun_s, b) - max(free_s, a)) for a, b in without_work)
        waited_s += max(0.0, begun_s - free_s - idle_s)
        busy_s += max(0.0, done_s - begun_s)
        free_s = max(free_s, done_s)
    return DeviceTimes(busy_s=busy_s, waited_s=waited_s)
