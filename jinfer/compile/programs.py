"""Compiles the programs of one engine at start-up, and guards against later compilations."""

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jinfer.compile.background import Background
from jinfer.compile.compiler_options import Options
from jinfer.compile.program_key import lowered_text, shapes_text
from jinfer.compile.program_store import ProgramStore

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A function, the shapes to compile it for, and the arguments it donates."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    donate: tuple[int, ...]
    made_from: str | None = None  # all inputs of `function`; None: never stored
    compiler_options: Options = ()

    @property
    def description(self) -> str | None:
        """A text that identifies the program in the same `Surroundings`; None if unknown."""
        if self.made_from is None:
            return None
        made_from = self.made_from, self.donate, self.compiler_options
        return repr((self.name, *made_from, shapes_text(self.shapes)))

    def lower(self) -> jax.stages.Lowered:
        # A new function, or JAX may return a program from memory that it once read from its cache.
        # Such a program cannot be stored, and JAX reports a cache hit only when it reads the file.
        function: Any = partial(self.function)
        function.__name__ = self.name.replace(" ", "_")  # in profiles and XLA dumps
        # With keep_unused=True, JAX 0.11 keeps programs alive until its caches are cleared.
        return jax.jit(function, donate_argnums=self.donate).lower(*self.shapes)

    def lowered_text(self, lowered: jax.stages.Lowered) -> str | None:
        """A text that identifies the traced program; None if unknown."""
        text = lowered_text(lowered, self.shapes)
        return None if text is None else repr((self.compiler_options, text))

    def compile(self, lowered: jax.stages.Lowered | None = None) -> jax.stages.Compiled:
        """Compiles a lowered program; without one, lowers it first."""
        lowered = lowered or self.lower()
        return lowered.compile(compiler_options=dict(self.compiler_options))


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileReport:
    """Times and counts of warm-up; `str` gives the start-up line."""

    elapsed_s: float  # from the first program's start to the last one's end
    program_s: Mapping[str, float]  # per program, tracing included
    num_cache_hits: int  # programs read from disk instead of compiled
    num_untraced: int  # of these: found without tracing

    @property
    def slowest(self) -> str:
        """The name of the program that took longest."""
        return max(self.program_s, key=lambda name: self.program_s[name])

    def __str__(self) -> str:
        num_compiled = len(self.program_s) - self.num_cache_hits
        return (
            f"ready: {num_compiled} programs compiled and {self.num_cache_hits} from the cache, "
            f"in {self.elapsed_s:.1f} s"
        )


class Compiling:
    """Compiles programs on background threads, while the caller loads the weights.

    One thread per processor: XLA releases Python's lock. A program in the store is loaded instead;
    one in JAX's persistent cache is traced and read, but not stored.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        store: ProgramStore | None = None,
        on_done: Callable[[str], object] = lambda name: None,
    ) -> None:
        """Starts compiling, in the order given.

        Args:
          programs: the programs, with distinct names.
          store: programs of earlier starts; new ones are saved to it.
          on_done: called with the name of each finished program, for a progress bar.
        """
        self._store, self._on_done = store, on_done
        self._start_s = self._end_s = time.perf_counter()
        self._program_s: dict[str, float] = {}
        self._loaded: set[str] = set()  # programs from the store
        self._untraced: set[str] = set()  # of these, found without tracing
        self._has_left = False
        self._num_hits_of: dict[int, int] = {}  # thread -> programs that JAX read from its cache
        self._listening = ExitStack()
        self._listening.callback(jax.monitoring.unregister_event_listener, self._listen)
        jax.monitoring.register_event_listener(self._listen)
        builds = {program.name: partial(self._build, program) for program in programs}
        self._background = Background(builds, num_threads=os.cpu_count() or 1)

    def result(self) -> tuple[dict[str, jax.stages.Compiled], CompileReport]:
        """Waits for all programs; raises the error of the first one, in order, that failed."""
        compiled = {name: future.result() for name, future in self._background.futures.items()}
        return compiled, CompileReport(
            elapsed_s=self._end_s - self._start_s,
            program_s=self._program_s,
            num_cache_hits=sum(self._num_hits_of.values()) + len(self._loaded),
            num_untraced=len(self._untraced),
        )

    def __enter__(self) -> "Compiling":
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Starts no further program; compilations in progress end in the background."""
        self._has_left = True
        self._background.stop()
        self._listening.close()

    def _build(self, program: Program) -> jax.stages.Compiled:
        self._num_hits_of.setdefault(threading.get_ident(), 0)
        start_s = time.perf_counter()
        compiled = self._load_or_compile(program)
        self._end_s = time.perf_counter()
        self._program_s[program.name] = self._end_s - start_s
        self._on_done(program.name)
        return compiled

    def _load_or_compile(self, program: Program) -> jax.stages.Compiled:
        store, described = self._store, program.description
        if store is None or described is None:
            return program.compile(self._lower(program))
        if (compiled := store.load(described)) is not None:
            self._loaded.add(program.name)
            self._untraced.add(program.name)
            return compiled
        lowered = self._lower(program)
        text = program.lowered_text(lowered)
        if text is None:
            return program.compile(lowered)
        if (compiled := store.load_lowered(described, text)) is not None:
            self._loaded.add(program.name)
            return compiled
        num_hits_before = self._num_hits_of[threading.get_ident()]
        with store.alone():
            compiled = program.compile(lowered)
        # XLA for CPUs serializes a program that was read without an error, but incompletely.
        was_read = self._num_hits_of[threading.get_ident()] > num_hits_before
        if not was_read and not self._has_left:  # after leaving, hits are not counted
            store.save(described, text, compiled)
        return compiled

    def _lower(self, program: Program) -> jax.stages.Lowered:
        lowered = program.lower()
        if self._has_left:  # nobody waits for the longer part
            raise CancelledError
        return lowered

    def _listen(self, event: str, **_: Any) -> None:
        # JAX reports an event on its own thread; other engines may start at the same time.
        thread = threading.get_ident()
        if event == _CACHE_HIT_EVENT and thread in self._num_hits_of:
            self._num_hits_of[thread] += 1


class CompileGuard:
    """Counts compilations inside `watch`; there should be none.

    Every request reaches the device as array contents, so a compilation while serving is a bug in
    jinfer: `action` "warn" warns, "error" raises.
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
        """Counts compilations on this thread inside the block as late."""
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
