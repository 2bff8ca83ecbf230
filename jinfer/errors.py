"""Exceptions for errors of the user.

Every message says: the rule; got name=value. What to do.
"""

import difflib
import traceback
from collections.abc import Iterable
from typing import Any


class RequestError(ValueError):
    """One request cannot be served; the others are unaffected."""


class NaNLogitsError(RequestError):
    """The model's logits are NaN, so no token can be sampled."""


class CheckpointError(ValueError):
    """A model folder lacks a file or tensor, has one too many, or is damaged."""


def shown(value: Any) -> str:
    """The `repr` of a value, cut to 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"an {type(value).__name__} too long to print"
    return f"{text[:57]}..." if len(text) > 60 else text


def unknown_keyword(owner: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for an unknown keyword of `owner`; it suggests the nearest known name."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"It takes: {', '.join(known)}."
    return TypeError(f"{owner} has no parameter of this name; got {name!r}. {hint}")


def without_frames(error: Exception) -> Exception:
    """The error without its traceback; a note says where it was raised.

    Frames refer to the engine and to arrays on the device. A caller who keeps a failed output
    would keep them alive.
    """
    place = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    if place:
        error.add_note(f"Raised in the engine, most recent call last:\n{place}")
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
