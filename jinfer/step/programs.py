"""The compiled programs of one engine, made up front, and the guard against any later one."""

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A function, the shapes it is compiled for, and which arguments it consumes."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    donate: tuple[int, ...]

    def compile(self) -> jax.stages.Compiled:
        return jax.jit(self.function, donate_argnums=self.donate).lower(*self.shapes).compile()


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileReport:
    """What warm-up did, for the start-up lines."""

    num_programs: int
    elapsed_s: float


def compile_all(
    programs: list[Program], *, on_done: Callable[[str], object] = lambda name: None
) -> tuple[dict[str, jax.stages.Compiled], CompileReport]:
    """Compiles every program ahead of time, as many at once as there are processors.

    XLA compiles outside Python's lock; programs already in the persistent compilation cache
    are read from it instead.

    Args:
      programs: with distinct names.
      on_done: called with a program's name as it is finished, for a progress bar.
    """
    start_s = time.perf_counter()

    def build(program: Program) -> jax.stages.Compiled:
        compiled = program.compile()
        on_done(program.name)
        return compiled

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compiled = list(pool.map(build, programs))
    report = CompileReport(num_programs=len(programs), elapsed_s=time.perf_counter() - start_s)
    return dict(zip((p.name for p in programs), compiled, strict=True)), report


class CompileGuard:
    """Counts compilations that happen inside its `watch`, which should be none.

    Everything a user can ask for arrives as array contents, so a compilation while serving
    is a bug of ours: `action` "warn" says so, "error" raises.
    """

    def __init__(self, action: str) -> None:
        if action not in ("warn", "error"):
            raise ValueError(f"late_compile must be 'warn' or 'error'; got {action!r}.")
        self.num_late = 0
        self._action = action
        self._watching = threading.local()
        self._seen = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT and getattr(self._watching, "on", False):
            self.num_late += 1

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Compilations on this thread inside the block are late."""
        before = self.num_late
        self._watching.on = True
        try:
            yield
        finally:
            self._watching.on = False
        if self.num_late > before:
            message = (
                "nothing may compile after warm-up; "
                f"got {self.num_late - before} compilations in one step. Report this as a bug."
            )
            if self._action == "error":
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=3)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
