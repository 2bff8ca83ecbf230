"""Output to a terminal, and numbers as text."""

import os
import sys

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# Text of a model must not move the cursor or change the window title.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def show(text: str, *, dim: bool = False) -> None:
    """Writes to standard output and flushes; a terminal gets no control characters.

    A character that the output's encoding lacks is written as its escape, such as \\u20ac.
    """
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    if sys.stdout.isatty():
        text = text.translate(_CONTROLS)
        if dim and text and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
            text = f"{_DIM}{text}{_PLAIN}"
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Writes a line about the program to standard error, in one piece: threads write there too."""
    sys.stderr.write(f"jinfer: {text}\n")
    sys.stderr.flush()


def milliseconds(elapsed_s: float | None) -> str:
    """ "12.3 ms", or "-" for None."""
    return "-" if elapsed_s is None else f"{elapsed_s * 1e3:,.1f} ms"


def binary_size(num_bytes: float) -> str:
    """ "6.2 MiB" """
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} bytes" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


def counted(number: int, thing: str) -> str:
    """ "1 token", "2 tokens" """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
