"""Fixtures of the command line's tests."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from jinfer.cli import main


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command in this process."""

    def run(*argv: str) -> Ran:
        return Ran(main(argv), *capsys.readouterr())

    return run
