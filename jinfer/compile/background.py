"""Background threads that never keep the process alive, although a compilation cannot be stopped.

Python kills its remaining threads while it exits. A thread that traces or compiles a program then
aborts the process, with a message and a false exit status. C++ destructors that run during a
compilation abort it too. So tracing is stopped, and while XLA compiles the process ends in another
way: see `_Leaving`.
"""

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

WRITING_S = 1.0  # the longest wait for a file that a thread is writing
STOPPING_S = 0.3  # the longest wait for threads that run Python code


class Stopped(BaseException):
    """Ends a call of `Background` after `stop`."""


class Background(Generic[T]):
    """Calls functions on daemon threads, in the order given.

    A `concurrent.futures.ThreadPoolExecutor` would make Python wait at exit for calls in progress.
    """

    def __init__(self, calls: Mapping[str, Callable[[], T]], num_threads: int) -> None:
        """Starts the threads.

        Args:
          calls: name -> function without arguments.
          num_threads: how many functions run at the same time, at most.
        """
        self.futures: dict[str, Future[T]] = {name: Future() for name in calls}
        self._waiting: SimpleQueue[tuple[Future[T], Callable[[], T]]] = SimpleQueue()
        for name, call in calls.items():
            self._waiting.put((self.futures[name], call))
        self._threads = [
            threading.Thread(target=self._work, name=f"jinfer-compile-{i}", daemon=True)
            for i in range(min(num_threads, len(calls)))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Starts no further call; calls in progress go on, but hardly delay the process's end."""
        for future in self.futures.values():
            future.cancel()
        busy = [thread for thread in self._threads if thread.is_alive()]
        if busy:
            _Leaving(busy).at_exit()

    def _work(self) -> None:
        while True:
            try:
                future, call = self._waiting.get_nowait()
            except Empty:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # the caller of `result` gets it
                future.set_exception(error)
            del future, call  # else this frame keeps the result alive


class _Leaving:
    """Ends the process while threads are busy, with its own exit status and without noise.

    Python finalizes as usual, so functions registered with `atexit` run and files are flushed.
    A thread that comes back to Python meanwhile would abort the process; here it sleeps. The
    process ends before C++ destructors run.
    """

    def __init__(self, threads: list[threading.Thread]) -> None:
        self._threads = threads

    def at_exit(self) -> None:
        # Functions run in reverse order: this one before those of modules imported earlier.
        atexit.register(self._leave)

    def _leave(self) -> None:
        if not any(thread.is_alive() for thread in self._threads):
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends already
        gc.disable()
        sys.unraisablehook = _tell_unless_stopped
        busy = _still_busy(self._threads)
        if not busy or os.name != "posix":
            return
        wait_for_writing(busy)
        gc.freeze()  # to free the traces of half-compiled programs takes seconds
        libc = ctypes.CDLL(None)
        _silence_native_errors()
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal(signal.SIGABRT, _address(libc.pause))
        if hasattr(libc, "on_exit"):  # glibc: calls `_exit` with the status
            libc.on_exit.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
            libc.on_exit(_address(libc._exit), None)


def _tell_unless_stopped(error: Any) -> None:
    """Reports an error that Python cannot raise, as in a callback; hides `Stopped`."""
    if error.exc_type is not Stopped:
        sys.__unraisablehook__(error)


def _raise_in(threads: list[threading.Thread]) -> None:
    """Raises `Stopped` in threads that run Python code, but not while they write a file."""
    for thread in threads:
        if thread.ident is not None and not _is_writing(thread):
            number, error = ctypes.c_ulong(thread.ident), ctypes.py_object(Stopped)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(number, error)


def _still_busy(threads: list[threading.Thread]) -> list[threading.Thread]:
    """Stops threads; returns those still alive after `STOPPING_S`: inside XLA, or writing."""
    busy = [thread for thread in threads if thread.is_alive()]
    end_s = time.monotonic() + STOPPING_S
    while busy and time.monotonic() < end_s:
        _raise_in(busy)  # again: JAX may have caught the one before
        busy[0].join(0.05)
        busy = [thread for thread in busy if thread.is_alive()]
    return busy


def wait_for_writing(threads: list[threading.Thread]) -> None:
    """Waits, up to `WRITING_S`, until none of these threads writes an entry of JAX's cache.

    JAX writes entries in place, and never replaces one: a half-written entry would stay.
    """
    end_s = time.monotonic() + WRITING_S
    while time.monotonic() < end_s and any(map(_is_writing, threads)):
        time.sleep(0.01)


def _is_writing(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "put" and os.path.basename(code.co_filename) == "lru_cache.py":
            return True
        frame = frame.f_back
    return False


def _silence_native_errors() -> None:
    """Discards what C++ prints about an abort; Python's standard error goes on."""
    try:
        sys.stderr.flush()
        if sys.stderr.fileno() != 2:
            return
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except (AttributeError, OSError, ValueError):  # closed, or not a file: nothing to save
        return
    sys.stderr = os.fdopen(kept, "w", buffering=1, errors="backslashreplace")
    os.dup2(nowhere, 2)


def _address(function: Any) -> ctypes.c_void_p:
    return ctypes.cast(function, ctypes.c_void_p)
