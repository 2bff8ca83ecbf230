"""The compiled programs of one engine, made up front, and the guard against any later one."""

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jinfer.compile.compiler_options import Options
from jinfer.compile.program_key import lowered_text, shapes_text
from jinfer.compile.program_store import ProgramStore

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A function, the shapes it is compiled for, and which arguments it consumes."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    donate: tuple[int, ...]
    made_from: str | None = None  # all that `function` follows from; None: it is never stored
    compiler_options: Options = ()

    @property
    def description(self) -> str | None:
        """What tells it from every other program in one place; None if that is not known."""
        if self.made_from is None:
            return None
        made_from = self.made_from, self.donate, self.compiler_options
        return repr((self.name, *made_from, shapes_text(self.shapes)))

    def lower(self) -> jax.stages.Lowered:
        # A new function to JAX, which else may hand out what it once read from its cache: a program
        # that was read, not compiled, cannot be stored, and JAX tells only when it reads it.
        function: Any = partial(self.function)
        function.__name__ = self.name.replace(" ", "_")  # in profiles and in what XLA dumps
        # With keep_unused=True, JAX 0.11 would hold what is compiled until its caches are cleared.
        return jax.jit(function, donate_argnums=self.donate).lower(*self.shapes)

    def lowered_text(self, lowered: jax.stages.Lowered) -> str | None:
        """What tells it from every other program once it is traced; None if that is not known."""
        text = lowered_text(lowered, self.shapes)
        return None if text is None else repr((self.compiler_options, text))

    def compile(self, lowered: jax.stages.Lowered | None = None) -> jax.stages.Compiled:
        """Compiles what `lower` gave, or lowers it first."""
        lowered = lowered or self.lower()
        return lowered.compile(compiler_options=dict(self.compiler_options))


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileReport:
    """What warm-up did; its text is the start-up line."""

    elapsed_s: float  # from the first program's start to the last one's end
    program_s: Mapping[str, float]  # of each program, tracing included
    num_cache_hits: int  # programs read from disk instead of compiled
    num_untraced: int  # of these: found by what they are made from, so not even traced

    def __str__(self) -> str:
        slowest = max(self.program_s, key=lambda name: self.program_s[name])
        return (
            f"{len(self.program_s)} programs in {self.elapsed_s:.1f} s, "
            f"{self.num_cache_hits} from the cache, {self.num_untraced} untraced; "
            f"longest: {slowest}, {self.program_s[slowest]:.1f} s"
        )


class Compiling:
    """Programs on their way to the device, on threads of their own, while others load weights.

    As many compile at once as there are processors: XLA works outside Python's lock. A program in
    the store is loaded instead; one in JAX's persistent cache is traced and read, but not stored.
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
          programs: with distinct names.
          store: where programs of earlier starts are, and where these are put.
          on_done: called with a program's name as it is finished, for a progress bar.
        """
        self._store, self._on_done = store, on_done
        self._start_s = self._end_s = time.perf_counter()
        self._program_s: dict[str, float] = {}
        self._loaded: set[str] = set()  # programs from the store
        self._untraced: set[str] = set()  # of these
        self._has_left = False
        self._num_hits_of: dict[int, int] = {}  # thread -> programs that JAX read from its cache
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
            num_cache_hits=sum(self._num_hits_of.values()) + len(self._loaded),
            num_untraced=len(self._untraced),
        )

    def __enter__(self) -> "Compiling":
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Begins no further program; one in XLA's hands runs to its end unseen."""
        self._has_left = True
        self._pool.shutdown(wait=False, cancel_futures=True)
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
            return program.compile()
        if (compiled := store.load(described)) is not None:
            self._loaded.add(program.name)
            self._untraced.add(program.name)
            return compiled
        lowered = program.lower()
        text = program.lowered_text(lowered)
        if text is None:
            return program.compile(lowered)
        if (compiled := store.load_lowered(described, text)) is not None:
            self._loaded.add(program.name)
            return compiled
        num_hits_before = self._num_hits_of[threading.get_ident()]
        with store.alone():
            compiled = program.compile(lowered)
        # XLA for CPUs takes a program that was read apart without complaint, but not all of it.
        was_read = self._num_hits_of[threading.get_ident()] > num_hits_before
        if not was_read and not self._has_left:  # then nobody listens any more
            store.save(described, text, compiled)
        return compiled

    def _listen(self, event: str, **_: Any) -> None:
        # JAX tells an event on the thread where it happens; other engines may start beside this.
        thread = threading.get_ident()
        if event == _CACHE_HIT_EVENT and thread in self._num_hits_of:
            self._num_hits_of[thread] += 1


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
