"""Compiled programs on disk, found by what they are made from.

JAX's persistent cache finds a program by its lowered text, so a start that compiles nothing still
traces and lowers every program, one at a time under Python's lock: nearly all of a warm start.
Here a program is found by what it is traced from, and needs neither. If that has changed it is
traced and lowered, and found by its lowered text: an edit that changes no program, or another
model's plan with some of the same programs, compiles nothing.
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

LOADED_EVENT = "/jinfer/program_store/loaded"  # a duration, as JAX tells those of its compilations

_HEAD = b"jinfer program 1\n"  # then the sha256 of what follows, then that
_DIGEST_BYTES = hashlib.sha256().digest_size
# A name, which is a hash of what is traced, holds another, a hash of what that gave, which is the
# program's. Files are written under a third.
_NAME, _PROGRAM, _UNFINISHED = ".name", ".program", ".unfinished"

# A program is kept so long after it was last used, and as many as fit into so many bytes.
_KEPT_S = 30 * 24 * 3600
_KEPT_BYTES = 4 << 30


class Stored(NamedTuple):
    """A program as `jax.experimental.serialize_executable` takes it apart."""

    payload: bytes
    in_tree: Any
    out_tree: Any


class ProgramStore:
    """The programs of one engine in a folder; whatever fails with it costs a compilation only.

    A file holds code that this process will run, as JAX's own cache does: whoever may write to the
    folder may do what the user may.
    """

    def __init__(self, folder: Path, devices: Sequence[Any], around: Surroundings) -> None:
        """Touches nothing yet.

        Args:
          folder: made when the first program is saved.
          devices: those the programs run on.
          around: what all programs follow from.
        """
        self.folder = folder
        self._devices = list(devices)
        self._around = around
        self._lock = threading.Lock()
        self._has_failed = False  # to save one

    def load(self, described: str) -> jax.stages.Compiled | None:
        """A program ready to run; None if it is not here, or is damaged, which is told.

        Args:
          described: what is traced, beside the surroundings of all.
        """
        path = self._attempt(self._name(described), self._program_named)
        return None if path is None else self._load(path)

    def load_lowered(self, described: str, lowered: str) -> jax.stages.Compiled | None:
        """The same, of a program that had to be traced; the next start will not have to.

        Args:
          described: as for `load`.
          lowered: what that gave.
        """
        path = self._program(lowered)
        compiled = self._load(path)
        if compiled is not None:
            self._write(self._name(described), lambda: path.name.encode())
        return compiled

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """Inside it JAX keeps no program: what JAX has read from its own cache cannot be stored.

        On GPUs it does, since replicas on other devices may read there what one has compiled; and
        so it does when a program could not be kept here.
        """
        if self._has_failed or self._devices[0].platform == "gpu":
            return contextlib.nullcontext()
        return not_kept_by_jax()

    def save(self, described: str, lowered: str, compiled: jax.stages.Compiled) -> None:
        """Keeps a program for the next start; the first that cannot be kept is told.

        Args:
          described: as for `load`.
          lowered: as for `load_lowered`.
          compiled: by this process; what was read from JAX's cache must not be saved.
        """
        path = self._program(lowered)
        # Packed, a fifth of the size, and on most disks sooner read.
        if self._write(path, lambda: zlib.compress(pickle.dumps(serialize(compiled)), level=1)):
            self._write(self._name(described), lambda: path.name.encode())

    def read(self, described: str) -> Stored | None:
        """What was saved, checked and unpacked but not loaded; None if nothing was.

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
        """What `read` makes of a file; None where that fails. A damaged file is removed."""
        try:
            return read(path)
        except Exception as error:  # whatever unpickling and XLA may raise
            _warn(f"a stored program is compiled again; got {str(path)!r}: {_line(error)}.")
            if isinstance(error, _DamagedError):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            return None

    def _write(self, path: Path, body_of: Callable[[], bytes]) -> bool:
        """Whether that went well."""
        unfinished = path.with_name(f"{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            body = body_of()
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                unfinished.write_bytes(_HEAD + hashlib.sha256(body).digest() + body)
                os.replace(unfinished, path)  # whoever reads finds all of it or nothing
            finally:
                unfinished.unlink(missing_ok=True)
        except Exception as error:  # whatever pickling and XLA may raise
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
    """The store beside the programs of JAX's compilation cache.

    Args:
      devices: those of the engine, in the order of its mesh.

    Returns:
      None if there is no such cache or none on a disk, if several processes compile together, or
      if what programs are made from cannot be told.
    """
    folder: str | None = jax.config.values["jax_compilation_cache_dir"]
    if not folder or "://" in folder or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    if jax.process_count() > 1:
        return None  # all would have to find a program, or none; JAX's cache sees to that itself
    around = surroundings(devices)
    if around is None:
        return None
    remove_unused(Path(folder) / "programs")
    return ProgramStore(Path(folder) / "programs", devices, around)


def remove_unused(folder: Path) -> None:
    """Removes programs that were not used for 30 days, and the longest unused beyond 4 GiB.

    What cannot be removed, or is gone already, is left to those who share the folder.
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
        if stat.st_mtime < time.time() - _KEPT_S or num_bytes > _KEPT_BYTES:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class _DamagedError(ValueError):
    """A file is not as it was written."""


def _unpack(path: Path) -> Stored | None:
    body = _content(path)
    return None if body is None else Stored(*pickle.loads(zlib.decompress(body)))


def _content(path: Path) -> memoryview | None:
    """What a file holds behind its head, which is checked; None if there is no such file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    body_at = len(_HEAD) + _DIGEST_BYTES
    body = memoryview(content)[body_at:]
    if content[:body_at] != _HEAD + hashlib.sha256(body).digest():
        raise _DamagedError("it is damaged")
    with contextlib.suppress(OSError):  # of a folder that others own
        os.utime(path)
    return body


def _hash(*texts: str) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
