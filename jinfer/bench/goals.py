"""Latency goals that a request must meet to count as good service."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinfer.bench.runner import Served


@dataclass(frozen=True, kw_only=True, slots=True)
class Goals:
    """The longest allowed times, in milliseconds; infinite without a goal."""

    ttft_ms: float = math.inf
    tpot_ms: float = math.inf
    e2el_ms: float = math.inf  # end to end

    @classmethod
    def parse(cls, words: Iterable[str]) -> "Goals":
        """Parses words such as "ttft:500", the form of `vllm bench serve --goodput`.

        Raises:
          ValueError: a word has another form.
        """
        given: dict[str, float] = {}
        for word in words:
            name, _, value = word.partition(":")
            try:
                limit_ms = float(value)
            except ValueError:
                limit_ms = math.nan
            if name not in ("ttft", "tpot", "e2el") or not limit_ms > 0 or f"{name}_ms" in given:
                raise ValueError(
                    "--goodput takes ttft, tpot and e2el, each once, with milliseconds; "
                    f"got {word!r}. Write such as: --goodput ttft:500 tpot:50."
                )
            given[f"{name}_ms"] = limit_ms
        return cls(**given)

    @classmethod
    def of_engine(cls, config: Any) -> "Goals":
        """The engine's own latency targets as goals."""
        targets = {"ttft_ms": config.ttft_target_ms, "tpot_ms": config.tpot_target_ms}
        return cls(**{name: ms for name, ms in targets.items() if ms is not None})

    @property
    def limits_ms(self) -> dict[str, float]:
        """The finite limits, by the name of the time."""
        limits = {"TTFT": self.ttft_ms, "TPOT": self.tpot_ms, "end to end": self.e2el_ms}
        return {name: ms for name, ms in limits.items() if ms < math.inf}

    def met_by(self, served: Served) -> bool:
        """Whether a request met all goals; a request of a single token always meets TPOT."""
        times_s = (served.ttft_s, served.tpot_s or 0.0, served.e2e_s)
        limits_ms = (self.ttft_ms, self.tpot_ms, self.e2el_ms)
        return all(s * 1e3 <= ms for s, ms in zip(times_s, limits_ms, strict=True))
