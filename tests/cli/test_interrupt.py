"""Ctrl-C before the first request ends the command at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jinfer.cli.interrupt import INTERRUPTED, at_once, ends_at_once

# The block is deaf: no exception can stop it, like an import or XLA.
PROGRAM = """
import time
from pathlib import Path
from jinfer.cli.interrupt import ends_at_once
with ends_at_once():
    print("inside", flush=True)
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            print("an exception")
"""


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell's background jobs, and their children, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("num_presses", [1, 2])
def test_a_process_that_hears_nothing_ends(num_presses: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    start_s = time.monotonic()
    for _ in range(num_presses):
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (INTERRUPTED, "", "jinfer: interrupted\n")
    assert time.monotonic() - start_s < 10  # the machine may be busy


def test_after_the_block_ctrl_c_is_an_exception_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with ends_at_once():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_a_handler_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert at_once(lambda: signal.getsignal(signal.SIGINT)) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


SCRIPT = """
import sys
from jinfer import LLM
LLM(max_num_seqs=1, max_num_batched_tokens=8, compilation_cache=sys.argv[1])
"""


def test_a_script_that_compiles_ends_with_the_exception(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "programs ready" not in (line := process.stderr.readline()):
        assert line, "it ended before it compiled"
    start_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start_s < 10  # two on a quiet machine; compiling takes longer
    assert process.returncode == -signal.SIGINT, err
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert not list(tmp_path.glob("programs/*.program"))
