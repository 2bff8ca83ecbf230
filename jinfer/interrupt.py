"""Ctrl-C that never lands in the middle of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """Whether Ctrl-C was pressed while a `deferred` block ran."""

    def __init__(self) -> None:
        self.pressed = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if it was; called between steps, where nothing is half done."""
        if self.pressed:
            raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[Interrupt]:
    """Inside the block the first Ctrl-C only sets a flag; the second acts at once.

    A step hands its donated buffers to the device and takes new ones back. An exception between
    the two would lose them, and with them the engine. Signals reach the main thread alone, so in
    any other thread the block changes nothing.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous: Any = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: FrameType | None) -> None:
        if interrupt.pressed and callable(previous):
            previous(signum, frame)
        interrupt.pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
