"""Checks of single sampling parameters: each returns the value in its normal form or raises."""

import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinfer.errors import RequestError, shown
from jinfer.request.prompt import require_unicode

# Each of the n completions takes a slot; more than a thousand is a typing error.
MAX_N = 1024
# Stop strings are searched in the text of every token: many or long ones cost time.
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
# Stored in rows of fixed size on the device, one per slot, so no request recompiles a step.
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 128  # also the limit on a slot's banned sequences of two or more tokens
MAX_BAD_WORD_TOKENS = 8
# Each adds a column to every step's output; a whole vocabulary takes too long to transfer.
MAX_LOGPROBS = 100
# The usual limit. To ban or force tokens, use bad_words or allowed_token_ids.
MAX_ABS_LOGIT_BIAS = 100.0
# Limits of the divisors of logits, far from the ends of float32 (1e-38 and 1e38).
MIN_DIVISOR = 1e-5
MAX_DIVISOR = 1e6
# Counts are int32 on the device.
MAX_COUNT = 2**31 - 1


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(f"{name} must be an integer; got {name}={shown(value)}. Pass an int.")
    return operator.index(value)


def integer_within(low: int, high: int, *, or_none: bool = False) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> int | None:
        if or_none and value is None:
            return None
        number = integer(name, value)
        if not low <= number <= high:
            # Python refuses to print integers of thousands of digits.
            shown = number if number.bit_length() < 200 else f"{number.bit_length()} bits"
            raise RequestError(
                f"{name} must be in [{low}, {high}]; got {name}={shown}. Choose a value in it."
            )
        return number

    return check


def number_within(low: float, high: float, *, above: bool = False) -> Callable[[str, Any], float]:
    bracket = "(" if above else "["

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise RequestError(f"{name} must be a number; got {name}={shown(value)}. Pass a float.")
        try:
            number = float(value)
        except OverflowError:  # an integer past 1e308
            number = float("inf")
        # NaN fails every comparison, so this refuses it too.
        if not (low < number if above else low <= number) or not number <= high:
            raise RequestError(
                f"{name} must be in {bracket}{low:g}, {high:g}]; got {name}={number}. "
                "Choose a value in it."
            )
        return number

    return check


def temperature(name: str, value: Any) -> float:
    number = number_within(0.0, MAX_DIVISOR)(name, value)
    if 0.0 < number < MIN_DIVISOR:
        raise RequestError(
            f"temperature must be 0 or at least {MIN_DIVISOR:g}; got temperature={number}. "
            "Use 0 for the likeliest token."
        )
    return number


def seed(name: str, value: Any) -> int | None:
    number = integer_within(-(2**63), 2**64 - 1, or_none=True)(name, value)
    return None if number == -1 else number  # -1 means no seed, as in vLLM


def top_k(name: str, value: Any) -> int:
    return max(0, integer_within(-1, MAX_COUNT)(name, value))


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be True or False; got {name}={shown(value)}. Pass a bool.")
    return value


def listed(name: str, value: Any, of: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(
            f"{name} must be a list of {of}; got {name}={shown(value)}. Pass a list."
        )
    return tuple(value)


def at_most(name: str, values: Any, limit: int) -> None:
    if len(values) > limit:
        raise RequestError(
            f"{name} holds at most {limit} entries; got {len(values)}. Pass fewer of them."
        )


def strings(limit: int) -> Callable[[str, Any], tuple[str, ...]]:
    def check(name: str, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        texts = (value,) if isinstance(value, str) else listed(name, value, "strings")
        at_most(name, texts, limit)
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text:
                raise RequestError(
                    f"{name} must hold strings that are not empty; got {shown(text)}. Drop it."
                )
            if len(text) > MAX_STOP_CHARS:
                raise RequestError(
                    f"{name} holds strings of at most {MAX_STOP_CHARS} characters; "
                    f"got one of {len(text)}. Shorten it."
                )
            require_unicode(f"{name}[{i}]", text)
        return tuple(dict.fromkeys(texts))

    return check


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    check = integer_within(0, MAX_COUNT)
    ids = [check(f"{name}[{i}]", one) for i, one in enumerate(listed(name, value, "token ids"))]
    return tuple(dict.fromkeys(ids))


def stop_token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = () if value is None else token_ids(name, value)
    at_most(name, ids, MAX_STOP_TOKEN_IDS)
    return ids


def allowed_token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = token_ids(name, value)
    if not ids:
        raise RequestError(
            "allowed_token_ids must allow at least one token; got an empty list. "
            "Pass None to allow all."
        )
    return ids


def logit_bias(name: str, value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(
            f"logit_bias must map token ids to numbers; got logit_bias={shown(value)}. Pass a dict."
        )
    at_most(name, value, MAX_LOGIT_BIASES)
    is_id = integer_within(0, MAX_COUNT)
    within = number_within(-MAX_ABS_LOGIT_BIAS, MAX_ABS_LOGIT_BIAS)
    bias = {}
    for key, number in value.items():
        # JSON has no integer keys; requests from a network have text.
        is_text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token_id = is_id("a key of logit_bias", int(key) if is_text else key)
        bias[token_id] = within(f"{name}[{token_id}]", number)
    return bias or None
