"""The engine's clock: how long its steps take, and when the next one can begin."""

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from jinfer.compile.names import decode_name, step_name
from jinfer.config import EngineConfig, EnginePlan
from jinfer.engine.dispatched import Dispatched
from jinfer.runner.model_runner import Runner
from jinfer.schedule.pace import Pace
from jinfer.step.pack import BucketShape, DecodeShape

# Skip a timing if the dispatch had finished while the caller held the loop for more than this
# fraction of it: the device was faster than the clock says.
_MAX_AWAY = 0.25
_NUM_RUNS = 2  # of each program at start-up: the first finds caches and memory pages cold


class Pacing:
    """Measures the device's steps for a `Pace`."""

    def __init__(self, config: EngineConfig, plan: EnginePlan) -> None:
        """Takes the targets from `config` and the sizes of steps from `plan`."""
        self._targets_ms = {
            "ttft_target_ms": config.ttft_target_ms,
            "tpot_target_ms": config.tpot_target_ms,
        }
        ttft_s, tpot_s = (None if ms is None else ms / 1e3 for ms in self._targets_ms.values())
        self.pace = Pace(
            plan.token_buckets,
            ttft_target_s=ttft_s,
            tpot_target_s=tpot_s,
            step_cost_tokens=plan.step_cost_tokens,
        )
        self._read_s = 0.0  # of `time.monotonic()`, when the last dispatch was read
        self._left_s = 0.0  # likewise, when the last step of the loop ended
        self._away_s = 0.0  # between steps of the loop, since the unread dispatch was sent

    def time_programs(
        self,
        runner: Runner,
        steps: Mapping[int, BucketShape],
        decodes: Mapping[int, DecodeShape],
    ) -> None:
        """Runs and times each program if there is a target, so that the first request is paced too.

        The batches are all padding: matrix products take their full time, attention takes none.
        Warns of a target that not even the fastest step meets.
        """
        if not (self.pace.has_ttft_target or self.pace.has_tpot_target):
            return
        programs: list[tuple[str, int, Any]] = []
        for size, shape in steps.items():
            programs.append((step_name(size), size, shape.empty()))
        for size, shape in decodes.items():
            batch = shape.empty()
            batch.num_samples_B[0] = 1  # of the null slot; without a row that samples no step runs
            programs.append((decode_name(size), size, batch))
        fastest_s = math.inf
        for name, size, batch in programs:
            elapsed_s = 0.0
            for _ in range(_NUM_RUNS):
                start_s = time.monotonic()
                jax.block_until_ready(runner.run(name, batch))
                elapsed_s = time.monotonic() - start_s
            self.pace.times.observe(size, elapsed_s)
            fastest_s = min(fastest_s, elapsed_s)
        for name, target_ms in self._targets_ms.items():
            if target_ms is not None and target_ms < fastest_s * 1e3:
                warnings.warn(
                    f"{name} must leave time for a step; got {name}={target_ms:g}, where the "
                    f"fastest takes {fastest_s * 1e3:.3g} ms. Raise it.",
                    stacklevel=2,
                )

    def next_start_s(self, pending: Dispatched | None) -> float:
        """Estimates when the device can begin the next dispatch, after `pending`."""
        now = time.monotonic()
        if pending is None:
            return now
        steps_s = pending.plan.num_steps * self.pace.times.predict(pending.num_places)
        return max(now, max(pending.start_s, self._read_s) + steps_s)

    def step_begins(self, pending: Dispatched | None) -> None:
        """Notes that a step of the loop begins; `pending` was in flight since the last one."""
        self._away_s = 0.0 if pending is None else self._away_s + time.monotonic() - self._left_s

    def step_ends(self) -> None:
        self._left_s = time.monotonic()

    def was_read(self, dispatched: Dispatched, now: float, *, was_done: bool) -> None:
        """Times a dispatch, of which the host read the result of one step at `now`.

        Args:
          dispatched: the dispatch.
          now: of `time.monotonic()`.
          was_done: the device had finished when the host began to wait.
        """
        # The device began it when it was sent or when the one before ended, whichever is later.
        begun_s, self._read_s = max(dispatched.start_s, self._read_s), now
        away_s, self._away_s = self._away_s, 0.0
        elapsed_s = now - begun_s
        is_late = was_done and away_s > _MAX_AWAY * elapsed_s
        if dispatched.plan.num_steps == 1 and not is_late:
            self.pace.times.observe(dispatched.num_places, elapsed_s)
