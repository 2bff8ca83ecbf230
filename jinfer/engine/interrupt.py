"""Ctrl-C that never lands in the middle of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def deferred() -> Iterator[None]:
    """Delays the first Ctrl-C inside the block to its end; the second acts at once.

    A step hands its donated buffers to the device and takes new ones back. An exception between
    the two would lose them, and with them the engine. At the end the previous handler runs:
    Python's own raises KeyboardInterrupt.

    Only the main thread gets signals, so in any other thread the block changes nothing. Nor does
    it if Ctrl-C is ignored, ends the process, or is handled outside Python.
    """
    previous: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    pressed = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            previous(signum, frame)
        pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        previous(signal.SIGINT, None)
