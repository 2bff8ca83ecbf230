"""Counts JAX's compilations, and the programs that the program store loads."""

from typing import Any

import jax

from jinfer.compile.program_store import LOADED_EVENT

_COMPILED = "/jax/core/compile/backend_compile_duration"  # also for programs read from the cache
_HIT = "/jax/compilation_cache/cache_hits"


class CompileLog:
    """Counts from its construction to the end of the process."""

    def __init__(self) -> None:
        self._num_ready = self._num_hits = 0
        self._compile_s = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def figures(self) -> dict[str, float]:
        """Programs compiled, programs read, and the seconds of both, summed over threads."""
        return {
            "num_compiled": self._num_ready - self._num_hits,
            "num_read": self._num_hits,
            "compile_s": self._compile_s,
        }

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in (_COMPILED, LOADED_EVENT):
            self._num_ready += 1
            self._num_hits += event == LOADED_EVENT
            self._compile_s += duration_secs

    def _on_event(self, event: str, **_: Any) -> None:
        self._num_hits += event == _HIT
