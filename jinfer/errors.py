"""What can go wrong by the user's doing, as types a caller can tell apart.

Every message says: the rule; got name=value. What to do.
"""

import difflib
import traceback
from collections.abc import Iterable
from typing import Any


class RequestError(ValueError):
    """One request cannot be served as asked; the others are unaffected."""


class CheckpointError(ValueError):
    """A model folder is missing something, holds something extra, or is damaged."""


def shown(value: Any) -> str:
    """A value as Python spells it, short enough for a sentence."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"an {type(value).__name__} too long to print"
    return f"{text[:57]}..." if len(text) > 60 else text


def unknown_keyword(owner: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that `owner` does not take, with the nearest name it does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"It takes: {', '.join(known)}."
    return TypeError(f"{owner} has no parameter of this name; got {name!r}. {hint}")


def without_frames(error: Exception) -> Exception:
    """The error, with the place where it was raised as a note in place of frames.

    A frame holds what it could see, and so do those that called it: of a step, its arrays on the
    device and the engine. Whoever keeps a failed output would keep all of them.
    """
    place = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    if place:
        error.add_note(f"Raised in the engine, most recent call last:\n{place}")
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
