"""Prompts from the command line, a file or standard input."""

import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinfer.errors import RequestError
from jinfer.request.prompt import Prompt, as_prompt


def read_prompts(words: Sequence[str], file: str | None) -> list[Prompt]:
    """Reads all prompts, in the given order; the prompts of `file` come last.

    Args:
      words: the prompts of the command line; "-" stands for standard input.
      file: a file with one prompt or JSON object per line; None = no file.

    Raises:
      RequestError: there is no prompt, or one cannot be read.
    """
    if not words and file is None:
        if sys.stdin.isatty():
            raise RequestError(
                "generate needs a prompt; got none. "
                'Write one, as in `jinfer generate "Once upon a time"`, or use --file.'
            )
        words = ["-"]
    prompts: list[Prompt] = []
    for word in words:
        prompts += _standard_input() if word == "-" else [_from_word(word)]
    if file is not None:
        prompts += _from_file(file)
    if not prompts:
        raise RequestError(f"there must be a prompt; got none in {file or 'standard input'}.")
    return prompts


def _from_word(word: str) -> Prompt:
    try:
        word.encode()
    except UnicodeEncodeError:  # bytes outside the terminal's encoding
        raise RequestError(f"a prompt must be UTF-8 text; got {word!r}. Convert it.") from None
    return as_prompt(word)


def _standard_input() -> list[Prompt]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return _from_lines(sys.stdin, "standard input")
    except UnicodeDecodeError as error:
        raise _not_text("standard input", error) from None


def _from_file(file: str) -> list[Prompt]:
    try:
        with Path(file).open(encoding="utf-8") as lines:
            return _from_lines(lines, file)
    except OSError as error:
        raise RequestError(
            f"--file must be a readable file; got {file!r}: {error.strerror}. Check its name."
        ) from None
    except UnicodeDecodeError as error:
        raise _not_text(file, error) from None


def _from_lines(lines: Iterable[str], source: str) -> list[Prompt]:
    """One prompt for each line that is not blank."""
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if line.startswith("{"):
            prompts.append(_from_json(line, f"{source}, line {number}"))
        elif line.strip():
            prompts.append(as_prompt(line))
    return prompts


def _from_json(line: str, place: str) -> Prompt:
    try:
        return as_prompt(json.loads(line))
    except json.JSONDecodeError as error:
        raise RequestError(
            f"{place}: a line that begins with {{ must be JSON; got {error}. "
            'Write text that begins with { as {"prompt": "{..."}.'
        ) from None
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from None


def _not_text(source: str, error: UnicodeDecodeError) -> RequestError:
    return RequestError(f"prompts must be UTF-8 text; got {source}: {error.reason}. Convert it.")
