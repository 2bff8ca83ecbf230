"""A line about an engine's load from time to time, while requests run."""

import time
from collections.abc import Callable
from typing import Protocol

from jinfer.config import EngineConfig
from jinfer.engine.metrics import MetricsSnapshot
from jinfer.log import LOGGER

EVERY_S = 10.0


class _Engine(Protocol):
    config: EngineConfig

    @property
    def has_work(self) -> bool: ...

    def metrics(self) -> MetricsSnapshot: ...


class LoadLine:
    """Logs running, waiting and tokens per second, at most every `EVERY_S`.

    Off if disable_log_stats=True or progress=False. The time starts anew when all requests are
    done, so a short call logs nothing, and idle time does not count.
    """

    def __init__(self, engine: _Engine, *, now: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._now = engine, now
        self._is_on = engine.config.progress and not engine.config.disable_log_stats
        self._since_s = 0.0
        self._before: MetricsSnapshot | None = None  # at `_since_s`; None: idle

    def stepped(self) -> None:
        """Call after each step; logs the line if it is time."""
        if not self._is_on:
            return
        if not self._engine.has_work:
            self._before = None
            return
        now_s = self._now()
        if self._before is not None:
            if now_s - self._since_s < EVERY_S:
                return
            LOGGER.info(line(self._before, self._engine.metrics(), now_s - self._since_s))
        self._before, self._since_s = self._engine.metrics(), now_s


def line(before: MetricsSnapshot, after: MetricsSnapshot, elapsed_s: float) -> str:
    """The load in `after`, and the speed between the two."""
    num_prompt = after.num_prompt_tokens - before.num_prompt_tokens
    num_output = after.num_output_tokens - before.num_output_tokens
    num_cached = after.num_cached_tokens - before.num_cached_tokens
    cached = f" ({num_cached / num_prompt:.0%} from the prefix cache)" if num_cached else ""
    return (
        f"{after.num_running} running, {after.num_waiting} waiting; "
        f"{num_prompt / elapsed_s:,.0f} prompt tokens/s{cached}, "
        f"{num_output / elapsed_s:,.0f} output tokens/s; KV cache {after.kv_usage:.0%} full"
    )
