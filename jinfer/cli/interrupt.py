"""Ctrl-C on the command line."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from jinfer.compile.background import wait_for_writing

T = TypeVar("T")

INTERRUPTED = 128 + signal.SIGINT  # exit status of a program that a signal ended, as in shells
_CLEAR_LINE = "\r\x1b[K"


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Ctrl-C inside the block ends the process at once, with status 130 and one line.

    For the time before the first request, when there is nothing to save: importing and compiling
    cannot be stopped in another way. Another thread does it, for the main thread may be inside XLA
    for seconds, and an exception there or in the middle of an import may be lost.

    Changes nothing outside the main thread, or where Ctrl-C does not raise KeyboardInterrupt.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    threading.Thread(target=_end, args=(heard,), name="jinfer-interrupt", daemon=True).start()
    # Python writes the number of each signal there, whatever the main thread does.
    previous = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda signum, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(previous)
        told.close()


def at_once(make: Callable[[], T]) -> T:
    """Returns `make()`, inside `ends_at_once`."""
    with ends_at_once():
        return make()


def _end(heard: socket.socket) -> None:
    with heard:
        while numbers := heard.recv(64):
            if signal.SIGINT in numbers:
                clear = _CLEAR_LINE if sys.stderr.isatty() else ""
                with suppress(OSError):  # nobody may read it
                    os.write(2, f"{clear}jinfer: interrupted\n".encode())
                wait_for_writing(threading.enumerate())
                os._exit(INTERRUPTED)
