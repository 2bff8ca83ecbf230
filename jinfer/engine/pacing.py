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

# A dispatch that was done when the host came, which had spent more than this share of its time
# outside the loop, with a caller who reads slowly or has gone, took the device less than that time.
_MAX_AWAY = 0.25
_NUM_RUNS = 2  # of each step at the start: the first finds caches and pages of memory cold


class Pacing:
    """Tells a `Pace` what the device does."""

    def __init__(self, config: EngineConfig, plan: EnginePlan) -> None:
        """With the targets of `config`, for the steps of `plan`."""
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
        self._left_s = 0.0  # likewise, when the last turn of the loop ended
        self._away_s = 0.0  # between turns, since what is on its way was sent

    def time_programs(
        self,
        runner: Runner,
        steps: Mapping[int, BucketShape],
        decodes: Mapping[int, DecodeShape],
    ) -> None:
        """Where there are targets, runs each program, so that the first request is paced already.

        On padding alone: matrix products do not care, attention has nothing to do. Warns of a
        target that not even the fastest step meets.
        """
        if not (self.pace.has_ttft_target or self.pace.has_tpot_target):
            return
        programs: list[tuple[str, int, Any]] = []
        for size, shape in steps.items():
            programs.append((step_name(size), size, shape.empty()))
        for size, shape in decodes.items():
            batch = shape.empty()
            batch.num_samples_B[0] = 1  # by the bin; where nobody draws, no step is run
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
        """When the device can begin what is sent next, about; `pending` comes before it."""
        now = time.monotonic()
        if pending is None:
            return now
        steps_s = pending.plan.num_steps * self.pace.times.predict(pending.num_places)
        return max(now, max(pending.start_s, self._read_s) + steps_s)

    def step_begins(self, pending: Dispatched | None) -> None:
        """The loop turns again; `pending` was on its way while it did not."""
        self._away_s = 0.0 if pending is None else self._away_s + time.monotonic() - self._left_s

    def step_ends(self) -> None:
        self._left_s = time.monotonic()

    def was_read(self, dispatched: Dispatched, now: float, *, was_done: bool) -> None:
        """The results of a dispatch, or of one of its steps, came at `now`.

        Args:
          dispatched: what was read.
          now: of `time.monotonic()`.
          was_done: the device had finished when the host began to wait.
        """
        # It began when it was sent or when the one before was done, whichever is later.
        begun_s, self._read_s = max(dispatched.start_s, self._read_s), now
        away_s, self._away_s = self._away_s, 0.0
        elapsed_s = now - begun_s
        is_late = was_done and away_s > _MAX_AWAY * elapsed_s
        if dispatched.plan.num_steps == 1 and not is_late:
            self.pace.times.observe(dispatched.num_places, elapsed_s)
