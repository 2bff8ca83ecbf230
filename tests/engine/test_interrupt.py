"""Ctrl-C waits for the end of a block, and leaves an engine that works."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jinfer.engine.interrupt import deferred


@pytest.fixture
def handler() -> Iterator[Any]:
    """Puts SIGINT's handler back, whatever a test set."""
    previous = signal.getsignal(signal.SIGINT)
    yield previous
    signal.signal(signal.SIGINT, previous)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_press_waits_for_the_end_of_the_block(handler: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = False
    with pytest.raises(KeyboardInterrupt), deferred():
        press()
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_press_acts_at_once(handler: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), deferred():
        press()
        press()
        pytest.fail("went on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_users_own_handler_answers(handler: Any) -> None:
    presses: list[int] = []
    signal.signal(signal.SIGINT, lambda signum, frame: presses.append(signum))
    with deferred():
        press()
        assert not presses
    assert presses == [signal.SIGINT]


def test_an_ignored_signal_stays_ignored(handler: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred():
        press()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_error_inside_passes_through(handler: Any) -> None:
    with pytest.raises(ZeroDivisionError), deferred():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_thread_leaves_the_handler_alone(handler: Any) -> None:
    seen = []

    def look() -> None:
        with deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [handler]
