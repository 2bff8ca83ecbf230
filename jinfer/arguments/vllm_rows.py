"""A row of the tables of vLLM's engine arguments, and four ways to write one."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One engine argument of vLLM: its default there, and its fate here.

    Exactly one of three is set: `own`, or `accepts`, or `any_value`.
    """

    default: Any  # vLLM's; a dict stands for a configuration object without settings
    own: str | None = None  # the argument of jinfer with this meaning
    accepts: tuple[Any, ...] = ()  # values that describe what jinfer does; it refuses others
    any_value: bool = False  # the value makes no difference in jinfer
    note: str = ""  # the difference from vLLM, or the reason for the values


Rows = dict[str, Row]


def same(name: str, default: Any, note: str = "") -> Rows:
    """An argument with the same name and meaning; `note` tells a difference."""
    return {name: Row(default=default, own=name, note=note)}


def means(name: str, own: str, default: Any, note: str = "") -> Rows:
    """An argument that jinfer calls `own`."""
    return {name: Row(default=default, own=own, note=note)}


def only(note: str, *accepted: Any, **defaults: Any) -> Rows:
    """Arguments that are accepted at their defaults, None, and `accepted`."""
    return {
        name: Row(default=default, accepts=_distinct(None, default, *accepted), note=note)
        for name, default in defaults.items()
    }


def any_value(note: str, **defaults: Any) -> Rows:
    """Arguments whose value makes no difference in jinfer."""
    return {
        name: Row(default=default, any_value=True, note=note) for name, default in defaults.items()
    }


def table(*parts: Rows) -> Rows:
    """All rows; a name may appear once."""
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names)), "an argument with two rows"
    return {name: row for part in parts for name, row in part.items()}


def equal(value: Any, accepted: Any) -> bool:
    """Whether two values are equal; arrays and other odd objects are not."""
    if value is accepted:
        return True
    plain = bool | int | float | str | list | tuple | dict | set | frozenset
    return isinstance(value, plain) and accepted is not None and value == accepted


def _distinct(*values: Any) -> tuple[Any, ...]:
    kept: list[Any] = []
    for value in values:
        if not any(type(value) is type(one) and value == one for one in kept):
            kept.append(value)
    return tuple(kept)
