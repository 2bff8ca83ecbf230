"""The messages that a user types, pastes or pipes into `jinfer chat`."""

import importlib
import importlib.util
import io
import sys

MARK, MORE_MARK = "> ", ". "
_QUOTES = '"""'


def prepare_input() -> None:
    """Sets up standard input: UTF-8 from a pipe; editing, history and pastes on a terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        # Other bytes make one message invalid, not the whole input.
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    if sys.stdin.isatty() and importlib.util.find_spec("readline") is not None:
        readline = importlib.import_module("readline")  # gives input() its editing and history
        # Python turns it off. On, the lines of a paste wait for Enter, as one message.
        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def read_message() -> str:
    r"""One message: a line, or several lines.

    A line that ends in a backslash goes on in the next one. Lines between two \"\"\" are one
    message, whatever they hold. So are pasted lines, where the terminal marks a paste.

    Raises:
      EOFError: the input has ended.
    """
    line = _read_line(MARK)
    if line.lstrip().startswith(_QUOTES):
        return _quoted(line.lstrip().removeprefix(_QUOTES))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        try:
            lines.append(_read_line(MORE_MARK))
        except EOFError:
            break
    return "\n".join(lines).strip()


def _quoted(line: str) -> str:
    lines = [line]
    while not lines[-1].rstrip().endswith(_QUOTES):
        try:
            lines.append(_read_line(MORE_MARK))
        except EOFError:
            return "\n".join(lines).strip()
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip()


def _read_line(mark: str) -> str:
    """One line of input; the mark goes to the terminal, not into a pipe."""
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        return input(mark)
    sys.stderr.write(mark)
    sys.stderr.flush()
    return input()
