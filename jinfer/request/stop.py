"""Finish reasons, and the search for stop strings in text that comes in pieces."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Finish(enum.StrEnum):
    """Why a completion ended, in vLLM's words (`finish_reason`)."""

    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # the caller aborted it
    ERROR = "error"  # it failed; the request's `error` says why


@dataclass(frozen=True, slots=True)
class Checked:
    """The result for one piece of text."""

    text: str  # the text that may be shown now
    stop: str | None  # the stop string that ended the completion, or None


class StopChecker:
    """Finds the first stop string in text that comes in pieces; a match may span pieces.

    The first match is the one that ends first; if two end together, it is the longer one. Text that
    may be the start of a stop string is held back until it cannot match any more.

    Args:
      stop: the stop strings; none is empty.
      include_stop_str_in_output: shows the text up to the end of the match, not its start.

    Source: Knuth, Morris and Pratt, Fast Pattern Matching in Strings, 1977.
    """

    def __init__(self, stop: Iterable[str], *, include_stop_str_in_output: bool = False) -> None:
        self._patterns = [_Pattern(text) for text in stop]
        self._include = include_stop_str_in_output
        self._held = ""
        self._stopped = False

    def feed(self, text: str, *, may_stop: bool = True) -> Checked:
        """Takes the next piece of text; nothing is shown after the first match.

        Args:
          text: the new text.
          may_stop: False before min_tokens; a stop string that ends in this piece is then text.
        """
        assert not self._stopped, f"fed after the output stopped: {text=}"
        if not self._patterns:
            return Checked(text, None)
        shown = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            stop = self._advance(char)
            if stop is not None and may_stop:
                self._held, self._stopped = "", True
                return Checked(shown[: end if self._include else end - len(stop)], stop)
        num_held = 0 if self._include else max(p.num_matched for p in self._patterns)
        cut = len(shown) - num_held
        self._held = shown[cut:]
        return Checked(shown[:cut], None)

    def flush(self) -> str:
        """Returns the text held back; for completions that ended for another reason."""
        text, self._held = self._held, ""
        return text

    def _advance(self, char: str) -> str | None:
        """Moves every pattern by one character; returns the longest complete one."""
        complete = [p.text for p in self._patterns if p.advance(char)]
        return max(complete, key=len, default=None)


class _Pattern:
    """One stop string, and how many of its first characters the text ends with."""

    def __init__(self, text: str) -> None:
        assert text, "an empty stop string"
        self.text = text
        self.num_matched = 0
        # _shorter[i]: length of the longest proper prefix of text that ends text[:i].
        self._shorter = [0, 0]
        for char in text[1:]:
            length = self._shorter[-1]
            while length and text[length] != char:
                length = self._shorter[length]
            self._shorter.append(length + (text[length] == char))

    def advance(self, char: str) -> bool:
        """Takes one character; returns whether the pattern is now complete."""
        length = self.num_matched
        while length and self.text[length] != char:
            length = self._shorter[length]
        length += self.text[length] == char
        complete = length == len(self.text)
        self.num_matched = self._shorter[length] if complete else length
        return complete
