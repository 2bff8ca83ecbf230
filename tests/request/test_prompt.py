"""Prompts in every spelling that users have."""

from typing import Any

import numpy as np
import pytest

from jinfer.errors import RequestError
from jinfer.request.prompt import Prompt, as_prompt, check_prompt_ids, checked_salt, split_prompts

_TEXT = Prompt("hi", None)
_IDS = Prompt(None, (1, 2))


@pytest.mark.parametrize(
    ("prompts", "want", "single"),
    [
        ("hi", [_TEXT], True),
        ("", [Prompt("", None)], True),
        ([1, 2], [_IDS], True),
        ((1, 2), [_IDS], True),
        (range(1, 3), [_IDS], True),
        ([np.int32(1), 2], [_IDS], True),
        (np.array([1, 2]), [_IDS], True),
        ({"prompt": "hi"}, [_TEXT], True),
        ({"prompt_token_ids": [1, 2]}, [_IDS], True),
        ({"prompt": "hi", "prompt_token_ids": (1, 2)}, [Prompt("hi", (1, 2))], True),
        ({"prompt": "hi", "prompt_token_ids": None}, [_TEXT], True),
        (_IDS, [_IDS], True),
        (["hi"], [_TEXT], False),
        ([[1, 2]], [_IDS], False),
        ([[]], [Prompt(None, ())], False),
        ([[1, 2], "hi", {"prompt": "hi"}, np.array([1, 2])], [_IDS, _TEXT, _TEXT, _IDS], False),
        (np.array([[1, 2], [1, 2]]), [_IDS, _IDS], False),
        ([], [], False),
    ],
)
def test_split(prompts: object, want: list[Prompt], single: bool) -> None:
    got, is_single = split_prompts(prompts)
    assert (got, is_single) == (want, single)
    assert all(type(one) is int for prompt in got for one in prompt.token_ids or ())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (3, "a prompt must be text or token ids; got 3. Pass a string, a list"),
        (None, "a prompt must be text or token ids; got None"),
        (b"hi", "a prompt must be text or token ids|token ids must be a list"),
        ([None], "a prompt must be text or token ids; got None"),
        ([1, 2.5], "token ids must be integers; got 2.5 at position 1"),
        ([True], "token ids must be integers; got True at position 0"),
        ([[1, "a"]], "token ids must be integers; got 'a' at position 1"),
        (["x" * 9, 3], "a prompt must be text or token ids; got 3"),
        ({}, r'takes the keys "prompt", "prompt_token_ids" and "cache_salt"; got \[\]'),
        ({"text": "hi"}, r"got \['text'\]"),
        ({"prompt": 3}, '"prompt" must be a string; got 3'),
        ({"prompt": None}, "must hold a prompt; got only None"),
        ({"prompt_token_ids": "12"}, "token ids must be a list of integers; got '12'"),
        (np.array([1.5]), r"must hold integers in one dimension; got dtype=float64, shape=\(1,\)"),
        (np.zeros((1, 1, 1), int), r"in one dimension; got dtype=int64, shape=\(1, 1\)"),
        (np.array(3), r"in one dimension; got dtype=int64, shape=\(\)"),
        (object, r"got <class 'object'>"),
    ],
)
def test_refusals(prompts: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        split_prompts(prompts)


def test_one_bad_prompt_of_many_is_named_by_its_index() -> None:
    with pytest.raises(RequestError, match=r"^prompt 17: token ids must be integers; got 'a' at"):
        split_prompts([*[[5]] * 17, [1, "a"], "x"])
    for single in (3.5, [None], {"prompt": 3}):
        with pytest.raises(RequestError, match='^(a prompt must be|"prompt" must be)'):
            split_prompts(single)


def test_long_values_are_shortened() -> None:
    with pytest.raises(RequestError, match=r"got '9{56}\.\.\. at position 0"):
        as_prompt(["9" * 1000])


def test_check_prompt_ids() -> None:
    limits: dict[str, Any] = {"vocab_size": 10, "max_model_len": 4}
    check_prompt_ids((0, 9, 5), **limits)
    with pytest.raises(RequestError, match="needs at least one token; got none"):
        check_prompt_ids((), **limits)
    with pytest.raises(
        RequestError, match="got 4 tokens with max_model_len=4. Shorten it to 3 tokens"
    ):
        check_prompt_ids((1, 1, 1, 1), **limits)
    with pytest.raises(RequestError, match=r"must be in \[0, 10\); got 10 at position 1"):
        check_prompt_ids((1, 10), **limits)
    with pytest.raises(RequestError, match="got -1 at position 2"):
        check_prompt_ids((1, 2, -1), **limits)
    with pytest.raises(RequestError, match="got 10 at position 0. Encode the prompt with"):
        check_prompt_ids((10,), **limits)
    with pytest.raises(
        RequestError,
        match=r"of a text must be in \[0, 10\).*got 10 at position 1, .*"
        "Leave that part of the text out",
    ):
        check_prompt_ids((1, 10), **limits, has_text=True)


@pytest.mark.parametrize("salt", [5, None, b"a", "\ud800"])
def test_a_salt_that_is_no_text_is_refused(salt: Any) -> None:
    assert checked_salt("tenant 1") == "tenant 1"
    with pytest.raises(RequestError, match="cache_salt"):
        checked_salt(salt)
