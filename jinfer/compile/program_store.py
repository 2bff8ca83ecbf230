"""Compiled programs on disk, keyed by the inputs of tracing.

JAX's persistent cache is keyed by lowered text, so a start that compiles nothing still traces and
lowers every program, one at a time under Python's lock: nearly all of a warm start. This store is
keyed by the inputs of tracing, so a hit needs neither. On a miss the program is traced and lowered,
and looked up by its lowered text. So an edit that changes no program compiles nothing, nor does
another model's plan for the programs that both have.
"""

import contextlib
import hashlib
import os
import pickle
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from jinfer.compile.program_key import Surroundings, surroundings
from kernels_pallas.compat import not_kept_by_jax

LOADED_EVENT = "/jinfer/program_store/loaded"  # a duration, like those of JAX's compilations

_HEAD = b"jinfer program 1\n"  # then the sha256 of the body, then the body
_DIGEST_BYTES = hashlib.sha256().digest_size
# HASH.name: the hash is of the inputs of tracing, the content is the file name of the program.
# HASH.program: the hash is of the lowered text. Files are written as ID.unfinished, then renamed.
_NAME, _PROGRAM, _UNFINISHED = ".name", ".program", ".unfinished"

# Limits of the folder: seconds since a file was last used, and total bytes.
_KEPT_S = 30 * 24 * 3600
_UNFINISHED_S = 3600  # a process that was killed left it
_KEPT_BYTES = 4 << 30


class Stored(NamedTuple):
    """A program as `jax.experimental.serialize_executable` returns it."""

    payload: bytes
    in_tree: Any
    out_tree: Any


class ProgramStore:
    """The programs of one engine in a folder; a failure only costs a compilation.

    This process runs the code in these files, as with JAX's own cache: anyone who can write to the
    folder can do whatever the user can.
    """

    def __init__(self, folder: Path, devices: Sequence[Any], around: Surroundings) -> None:
        """Opens no file yet.

        Args:
          folder: created when the first program is saved.
          devices: the devices that run the programs.
          around: the inputs that all programs have in common.
        """
        self.folder = folder
        self._devices = list(devices)
        self._around = around
        self._lock = threading.Lock()
        self._has_failed = False  # True once saving a program has failed

    def load(self, described: str) -> jax.stages.Compiled | None:
        """A program ready to run; None if it is missing or, with a warning, damaged.

        Args:
          described: `Program.description`.
        """
        path = self._attempt(self._name(described), self._program_named)
        return None if path is None else self._load(path)

    def load_lowered(self, described: str, lowered: str) -> jax.stages.Compiled | None:
        """As `load`, by lowered text; also saves the name, so that the next start need not trace.

        Args:
          described: as for `load`.
          lowered: `Program.lowered_text`.
        """
        path = self._program(lowered)
        compiled = self._load(path)
        if compiled is not None:
            self._write(self._name(described), lambda: path.name.encode())
        return compiled

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """Disables JAX's cache inside: a program that JAX read from its cache cannot be stored.

        Two exceptions keep JAX's cache on. On GPUs, replicas on other devices may read programs
        from it. After a failure to save here, it is the only cache left.
        """
        if self._has_failed or self._devices[0].platform == "gpu":
            return contextlib.nullcontext()
        return not_kept_by_jax()

    def save(self, described: str, lowered: str, compiled: jax.stages.Compiled) -> None:
        """Stores a program for the next start; warns at the first failure only.

        Args:
          described: as for `load`.
          lowered: as for `load_lowered`.
          compiled: by this process; never a program that JAX read from its cache.
        """
        path = self._program(lowered)
        # Compressed to a fifth of the size, which most disks read faster.
        if self._write(path, lambda: zlib.compress(pickle.dumps(serialize(compiled)), level=1)):
            self._write(self._name(described), lambda: path.name.encode())

    def read(self, described: str) -> Stored | None:
        """A stored program, checked and unpacked but not loaded; None if it is missing.

        Raises:
          ValueError: a file is damaged.
        """
        path = self._program_named(self._name(described))
        return None if path is None else _unpack(path)

    def _load(self, path: Path) -> jax.stages.Compiled | None:
        start_s = time.perf_counter()
        compiled = self._attempt(path, self._ready)
        if compiled is not None:
            jax.monitoring.record_event_duration_secs(LOADED_EVENT, time.perf_counter() - start_s)
        return compiled

    def _ready(self, path: Path) -> jax.stages.Compiled | None:
        stored = _unpack(path)
        client = self._devices[0].client
        return None if stored is None else deserialize_and_load(*stored, client, self._devices)

    def _program_named(self, path: Path) -> Path | None:
        name = _content(path)
        return None if name is None else self.folder / bytes(name).decode()

    def _attempt(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """Returns `read(path)`, or None with a warning if it fails; removes a damaged file."""
        try:
            return read(path)
        except Exception as error:  # unpickling and XLA may raise anything
            _warn(f"a stored program is compiled again; got {str(path)!r}: {_line(error)}.")
            if isinstance(error, _DamagedError):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            return None

    def _write(self, path: Path, body_of: Callable[[], bytes]) -> bool:
        """Writes a file; returns whether that succeeded."""
        unfinished = path.with_name(f"{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            body = body_of()
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                unfinished.write_bytes(_HEAD + hashlib.sha256(body).digest() + body)
                os.replace(unfinished, path)  # readers see the whole file or none
            finally:
                unfinished.unlink(missing_ok=True)
        except Exception as error:  # pickling and XLA may raise anything
            if self._is_first_failure():
                _warn(
                    f"a compiled program is not kept; got {str(self.folder)!r}: {_line(error)}. "
                    "The next start compiles it again."
                )
            return False
        return True

    def _is_first_failure(self) -> bool:
        with self._lock:
            had_failed, self._has_failed = self._has_failed, True
        return not had_failed

    def _name(self, described: str) -> Path:
        return self.folder / (_hash(*self._around, described) + _NAME)

    def _program(self, lowered: str) -> Path:
        return self.folder / (_hash(self._around.compiling, lowered) + _PROGRAM)


def open_store(devices: Sequence[Any]) -> ProgramStore | None:
    """Opens the store in a folder inside JAX's compilation cache.

    Args:
      devices: the engine's devices, in mesh order.

    Returns:
      None if JAX has no cache on a local disk, if several processes compile together, or if the
      inputs of the programs are unknown.
    """
    folder: str | None = jax.config.values["jax_compilation_cache_dir"]
    if not folder or "://" in folder or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    if jax.process_count() > 1:
        return None  # all must hit or all must miss; JAX's cache ensures that
    around = surroundings(devices)
    if around is None:
        return None
    remove_unused(Path(folder) / "programs")
    return ProgramStore(Path(folder) / "programs", devices, around)


def remove_unused(folder: Path) -> None:
    """Removes files not used for 30 days, then the least recently used beyond 4 GiB.

    Of files that were never finished, removes those an hour old.

    Ignores files that cannot be removed, or that another process has removed.
    """
    found = []
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            if path.suffix in (_NAME, _PROGRAM, _UNFINISHED):
                found.append((path.stat(), path))
    found.sort(key=lambda entry: entry[0].st_mtime, reverse=True)
    num_bytes = 0
    for stat, path in found:
        num_bytes += stat.st_size
        kept_s = _UNFINISHED_S if path.suffix == _UNFINISHED else _KEPT_S
        if stat.st_mtime < time.time() - kept_s or num_bytes > _KEPT_BYTES:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class _DamagedError(ValueError):
    """The content of a file does not match its digest."""


def _unpack(path: Path) -> Stored | None:
    body = _content(path)
    return None if body is None else Stored(*pickle.loads(zlib.decompress(body)))


def _content(path: Path) -> memoryview | None:
    """The body of a file, checked against its head; None if the file is missing."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    body_at = len(_HEAD) + _DIGEST_BYTES
    body = memoryview(content)[body_at:]
    if content[:body_at] != _HEAD + hashlib.sha256(body).digest():
        raise _DamagedError("it is damaged")
    with contextlib.suppress(OSError):  # the folder may belong to another user
        os.utime(path)
    return body


def _hash(*texts: str) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
