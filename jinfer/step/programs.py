"""The compiled programs of one engine, made up front, and the guard against any later one."""

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


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
    """What warm-up did; its text is the start-up line."""

    elapsed_s: float  # from the first program's start to the last one's end
    program_s: Mapping[str, float]  # of each program, tracing included
    num_cache_hits: int  # programs read from the persistent compilation cache

    def __str__(self) -> str:
        slowest = max(self.program_s, key=lambda name: self.program_s[name])
        return (
            f"{len(self.program_s)} programs ready in {self.elapsed_s:.1f} s, "
            f"{self.num_cache_hits} of them from the compilation cache; "
            f"longest: {slowest}, {self.program_s[slowest]:.1f} s"
        )


class Compiling:
    """Programs on their way to the device, on threads of their own, while others load weights.

    As many compile at once as there are processors: XLA works outside Python's lock. Programs
    already in the persistent compilation cache are read from it instead.
    """

    def __init__(
        self, programs: Sequence[Program], *, on_done: Callable[[str], object] = lambda name: None
    ) -> None:
        """Starts compiling, in the order given.

        Args:
          programs: with distinct names.
          on_done: called with a program's name as it is finished, for a progress bar.
        """
        self._on_done = on_done
        self._start_s = self._end_s = time.perf_counter()
        self._program_s: dict[str, float] = {}
        self._num_cache_hits = 0
        self._threads: set[int] = set()
        self._listening = ExitStack()
        self._listening.callback(jax.monitoring.unregister_event_listener, self._listen)
        jax.monitoring.register_event_listener(self._listen)
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        self._futures = {p.name: self._pool.submit(self._build, p) for p in programs}

    def result(self) -> tuple[dict[str, jax.stages.Compiled], CompileReport]:
        """Waits for all of them; raises what the first that failed in their order raised."""
        compiled = {name: future.result() for name, future in self._futures.items()}
        return compiled, CompileReport(
            elapsed_s=self._end_s - self._start_s,
            program_s=self._program_s,
            num_cache_hits=self._num_cache_hits,
        )

    def __enter__(self) -> "Compiling":
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Begins no further program; one in XLA's hands runs to its end unseen."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._listening.close()

    def _build(self, program: Program) -> jax.stages.Compiled:
        self._threads.add(threading.get_ident())
        start_s = time.perf_counter()
        compiled = program.compile()
        self._end_s = time.perf_counter()
        self._program_s[program.name] = self._end_s - start_s
        self._on_done(program.name)
        return compiled

    def _listen(self, event: str, **_: Any) -> None:
        # JAX tells an event on the thread where it happens; other engines may start beside this.
        if event == _CACHE_HIT_EVENT and threading.get_ident() in self._threads:
            self._num_cache_hits += 1


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
