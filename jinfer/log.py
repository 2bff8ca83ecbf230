"""Lines about the program: the logger "jinfer", and a handler for users who have none.

Levels: DEBUG tells the details of start-up, INFO its main steps and the load of the engine, WARNING
what a user should look at. The environment variable `JINFER_LOG_LEVEL` sets the level.
"""

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

LEVEL_VARIABLE = "JINFER_LOG_LEVEL"
LOGGER = logging.getLogger("jinfer")
_JAX_LOGGER = logging.getLogger("jax._src.xla_bridge")

# JAX's warnings about a chip that it cannot use -> the chip, and our extra that brings its library.
_UNUSED_CHIPS = {
    "An NVIDIA GPU may be present": ("an NVIDIA GPU", "cuda13"),
    "A Google TPU may be present": ("a TPU", "tpu"),
}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def set_up_logging() -> None:
    """Sets the logger's level, and adds a handler if the user has none. Idempotent.

    The user's own handlers and level stay. In a notebook only handlers of the logger "jinfer"
    count: Colab has one at the root, which prints in red.

    Raises:
      ValueError: `JINFER_LOG_LEVEL` is no level.
    """
    level = _level()
    if level is not None:
        LOGGER.setLevel(level)
    elif LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    _JAX_LOGGER.addFilter(_in_our_words)  # twice is once
    if in_notebook():
        if not LOGGER.handlers:
            LOGGER.propagate = False
            LOGGER.addHandler(_Handler())
    elif not LOGGER.hasHandlers():
        LOGGER.addHandler(_Handler())


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows standard error in red."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and type(shell).__name__ != "TerminalInteractiveShell"


def screen() -> TextIO:
    """The stream for lines about the program, and for progress bars."""
    return sys.stdout if in_notebook() else sys.stderr


class _Handler(logging.Handler):
    """Writes a record as one line; a progress bar on the screen stays below the line."""

    def emit(self, record: logging.LogRecord) -> None:
        if LOGGER.propagate and logging.getLogger().handlers:
            return  # the user has set up logging since
        try:
            level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
            text = f"jinfer: {level}{record.getMessage()}"
            if record.exc_info and record.exc_info[0] is not None:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            tqdm.write(text, file=screen())
            screen().flush()
        except Exception:
            self.handleError(record)


def _in_our_words(record: logging.LogRecord) -> bool:
    """Replaces JAX's warning about an unused chip by a line that says what to do about it."""
    for start, (chip, extra) in _UNUSED_CHIPS.items():
        if record.getMessage().startswith(start):
            LOGGER.warning(
                "this machine seems to have %s, but JAX cannot use it and runs on the CPU. "
                "Install 'jinfer[%s]' to use it, or set JAX_PLATFORMS=cpu to hide this line.",
                chip,
                extra,
            )
            return False
    return True


def _level() -> int | None:
    given = os.environ.get(LEVEL_VARIABLE, "").strip().upper()
    if not given:
        return None
    if given.isdecimal():
        return int(given)
    if given not in _LEVELS:
        raise ValueError(
            f"{LEVEL_VARIABLE} must be one of {', '.join(_LEVELS)}, or a number; got "
            f"{LEVEL_VARIABLE}={os.environ[LEVEL_VARIABLE]!r}. Correct or unset it."
        )
    return logging.getLevelNamesMapping()[given]
