"""Background threads: results, cancelling, and a process that ends while one is busy."""

import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from jinfer.compile.background import Background

# A stand-in for XLA: native code that lets other threads run, for longer than any test.
BUSY = """
import sys, threading, time
from jinfer.compile.background import Background
background = Background({"native": lambda: time.sleep(600), "python": lambda: loop()}, 2)
def loop():
    while True:
        pass
import atexit
atexit.register(print, "registered earlier")
background.stop()
print("leaving", flush=True)
"""


def test_results_and_errors_reach_the_caller() -> None:
    background = Background({"half": lambda: 1 / 2, "none": lambda: 1 / 0}, num_threads=2)
    assert background.futures["half"].result() == 0.5
    with pytest.raises(ZeroDivisionError):
        background.futures["none"].result()
    background.stop()


def test_no_call_starts_after_stop() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def first() -> str:
        begun.set()
        assert may_end.wait(60)
        return "done"

    background = Background({"first": first, "second": lambda: "never"}, num_threads=1)
    assert begun.wait(60)
    background.stop()
    may_end.set()
    assert background.futures["first"].result(60) == "done"
    with pytest.raises(CancelledError):
        background.futures["second"].result(60)


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        ("sys.exit(3)", 3, ""),
        ("", 0, ""),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
    ],
)
def test_a_busy_thread_delays_no_exit_and_changes_no_status(
    ending: str, status: int, error: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUSY + ending], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.split("\n") == ["leaving", "registered earlier", ""]
    assert (done.stderr.splitlines() or [""])[-1] == error
    assert "Exception ignored" not in done.stderr and "FATAL" not in done.stderr
