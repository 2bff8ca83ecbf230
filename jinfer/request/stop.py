"""Why an output ends, and the search for stop strings in text that arrives in pieces."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Finish(enum.StrEnum):
    """Why an output ended, in vLLM's words (`finish_reason`)."""

    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # the caller took it back
    ERROR = "error"  # it could not be served; the request's `error` says why


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of one piece of text."""

    text: str  # may be shown now
    stop: str | None  # the stop string that ended the output, if one did


class StopChecker:
    """Finds the first stop string in text that comes piece by piece, wherever the pieces are cut.

    First is the one that is complete first; of two that end together, the longer. Text that may be
    the beginning of a stop string is held back until it is known not to be.

    Args:
      stop: the stop strings; none is empty.
      include_stop_str_in_output: shows the text up to the end of the match instead of its start.

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
          text: what the output gained.
          may_stop: False before min_tokens: a stop string that ends in this piece is only text.
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
        """The text held back, when the output ended for another reason."""
        text, self._held = self._held, ""
        return text

    def _advance(self, char: str) -> str | None:
        """Moves every pattern on by one character; the longest that is now complete."""
        complete = [p.text for p in self._patterns if p.advance(char)]
        return max(complete, key=len, default=None)


class _Pattern:
    """One stop string and how many of its characters the text so far ends with."""

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
        """Takes one character; says whether the pattern is now complete."""
        length = self.num_matched
        while length and self.text[length] != char:
            length = self._shorter[length]
        length += self.text[length] == char
        complete = length == len(self.text)
        self.num_matched = self._shorter[length] if complete else length
        return complete
