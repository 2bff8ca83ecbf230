"""Log lines: their level, the handler for users who have none, and notebooks."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from jinfer import log
from jinfer.log import LOGGER, set_up_logging


@contextmanager
def fresh_logging() -> Iterator[pytest.MonkeyPatch]:
    """The loggers as in a new process: pytest adds its handlers just before a test."""
    level = LOGGER.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOGGER, "handlers", [])
        patch.setattr(LOGGER, "propagate", True)
        patch.setattr(logging.getLogger(), "handlers", [])
        patch.delenv(log.LEVEL_VARIABLE, raising=False)
        LOGGER.setLevel(logging.NOTSET)
        yield patch
    LOGGER.setLevel(level)


def test_without_a_handler_lines_go_to_standard_error_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with fresh_logging():
        set_up_logging()
        set_up_logging()
        LOGGER.debug("hidden")
        LOGGER.info("ready")
        LOGGER.warning("look")
    assert capsys.readouterr() == ("", "jinfer: ready\njinfer: warning: look\n")


def test_the_users_handler_is_the_only_one(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    own = logging.Handler()
    own.emit = lambda record: told.append(record.getMessage())
    with fresh_logging():
        set_up_logging()
        logging.getLogger().addHandler(own)  # after the first engine has started
        LOGGER.info("ready")
        LOGGER.handlers.clear()
        set_up_logging()
        assert LOGGER.handlers == []
    assert told == ["ready"] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "level"), [("warning", logging.WARNING), ("DEBUG", logging.DEBUG), ("15", 15)]
)
def test_the_environment_sets_the_level(given: str, level: int) -> None:
    with fresh_logging() as patch:
        set_up_logging()
        assert LOGGER.level == logging.INFO
        LOGGER.setLevel(logging.ERROR)
        set_up_logging()
        assert LOGGER.level == logging.ERROR  # the user's
        patch.setenv(log.LEVEL_VARIABLE, given)
        set_up_logging()
        assert LOGGER.level == level


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.LEVEL_VARIABLE, "loud")
    with pytest.raises(ValueError, match="JINFER_LOG_LEVEL must be one of DEBUG, .*='loud'"):
        set_up_logging()


def test_in_a_notebook_lines_are_not_red(capsys: pytest.CaptureFixture[str]) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    with fresh_logging() as patch:
        patch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
        logging.getLogger().addHandler(logging.StreamHandler())  # as in Colab: standard error
        set_up_logging()
        LOGGER.info("ready")
        assert log.screen() is sys.stdout
    assert capsys.readouterr() == ("jinfer: ready\n", "")
    assert log.screen() is sys.stderr


def test_an_unused_chip_is_told_in_our_words(capsys: pytest.CaptureFixture[str]) -> None:
    jax_logger = logging.getLogger("jax._src.xla_bridge")
    with fresh_logging():
        set_up_logging()
        jax_logger.warning("An NVIDIA GPU may be present on this machine, but a CUDA-enabled")
        jax_logger.warning("Something else.")
    told = capsys.readouterr().err
    assert "jinfer: warning: this machine seems to have an NVIDIA GPU" in told
    assert "Install 'jinfer[cuda13]'" in told
    assert "CUDA-enabled" not in told
