"""Converts all accepted forms of a prompt to `Prompt`."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jinfer.errors import RequestError, shown

_HOW = 'Pass a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": [...]}.'


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its text, its token ids, or both if the caller knows both.

    Only prompts with the same `cache_salt` share cached prefixes. A hit never shows another's text,
    but it makes the first token come sooner. A tenant can guess a prefix and measure whether
    another tenant sent it. Give each tenant a salt of its own: then only the load on the machine
    depends on other tenants.
    """

    text: str | None
    token_ids: tuple[int, ...] | None
    cache_salt: str = ""


def split_prompts(prompts: Any) -> tuple[list[Prompt], bool]:
    """Splits the argument into prompts.

    A string, a flat list of ids, a one-dimensional array or a dict is one prompt. A list of these,
    or a two-dimensional array, is many prompts. An empty list is no prompt.

    Returns:
      The prompts, and whether the argument was a single prompt.

    Raises:
      RequestError: an element has none of these forms; names its index.
    """
    if _is_one(prompts):
        return [as_prompt(prompts)], True
    if not isinstance(prompts, Sequence | np.ndarray):
        raise RequestError(f"a prompt must be text or token ids; got {shown(prompts)}. {_HOW}")
    many = len(prompts) > 1
    return [_at_place(one, f"prompt {i}: " if many else "") for i, one in enumerate(prompts)], False


def as_prompt(prompt: Any) -> Prompt:
    """Converts one prompt to `Prompt`; it does not check the range of ids.

    Raises:
      RequestError: the prompt has an unknown type, or an id is not an integer.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, Mapping):
        return _from_mapping(prompt)
    if isinstance(prompt, str):
        return Prompt(text=prompt, token_ids=None)
    if isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes | bytearray):
        return Prompt(text=None, token_ids=_as_ids(prompt))
    raise RequestError(f"a prompt must be text or token ids; got {shown(prompt)}. {_HOW}")


def check_prompt_ids(
    token_ids: Sequence[int], *, vocab_size: int, max_model_len: int, has_text: bool = False
) -> None:
    """Refuses token ids that this model does not support.

    Args:
      token_ids: the prompt, special tokens included.
      vocab_size: V, rows of the model's embedding.
      max_model_len: tokens of prompt and output together.
      has_text: whether they are the ids of a text; changes the advice.

    Raises:
      RequestError: the prompt is empty, too long for one token of output, or has an id outside
        the vocabulary; the message names its position.
    """
    if len(token_ids) == 0:
        raise RequestError("a prompt needs at least one token; got none. Pass some text or ids.")
    if len(token_ids) >= max_model_len:
        raise RequestError(
            f"a prompt must leave room for one token of output; got {len(token_ids)} tokens with "
            f"max_model_len={max_model_len}. Shorten it to {max_model_len - 1} tokens, or raise "
            "max_model_len."
        )
    if min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    position, token_id = next(
        (i, one) for i, one in enumerate(token_ids) if not 0 <= one < vocab_size
    )
    if has_text and token_id >= vocab_size:
        raise RequestError(
            f"the tokens of a text must be in [0, {vocab_size}), as the model has no others; got "
            f"{token_id} at position {position}, from a larger tokenizer. Leave that part of the "
            "text out, or use the tokenizer of this model."
        )
    raise RequestError(
        f"prompt token ids must be in [0, {vocab_size}); got {shown(token_id)} at position "
        f"{position}. Encode the prompt with the tokenizer of this model."
    )


def require_unicode(what: str, text: str) -> None:
    """Refuses text with half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} must be valid Unicode; got {text[error.start]!r} at character {error.start}. "
            "Replace it."
        ) from None


def _at_place(prompt: Any, place: str) -> Prompt:
    """`as_prompt`, with an error that begins with the prompt's place."""
    try:
        return as_prompt(prompt)
    except RequestError as error:
        raise RequestError(f"{place}{error}") from error.__cause__


def _is_one(prompts: Any) -> bool:
    if isinstance(prompts, str | Mapping | Prompt):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim < 2
    if isinstance(prompts, Sequence) and len(prompts) > 0:
        return all(_is_number(one) for one in prompts)
    return False


def _is_number(value: Any) -> bool:
    # Floats and bools count too: [1.5, 2.5] is one wrong prompt, not two.
    return isinstance(value, int | float | np.generic)


def _from_mapping(prompt: Mapping[str, Any]) -> Prompt:
    unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
    if unknown or not prompt:
        raise RequestError(
            'a prompt dict takes the keys "prompt", "prompt_token_ids" and "cache_salt"; '
            f"got {sorted(map(str, prompt))}. {_HOW}"
        )
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(f'"prompt" must be a string; got {shown(text)}. {_HOW}')
    if text is None and token_ids is None:
        raise RequestError(f"a prompt dict must hold a prompt; got only None in it. {_HOW}")
    ids = None if token_ids is None else _as_ids(token_ids)
    return Prompt(text=text, token_ids=ids, cache_salt=checked_salt(prompt.get("cache_salt", "")))


def checked_salt(salt: Any) -> str:
    """Returns a checked `cache_salt`.

    Raises:
      RequestError: the salt is not a string, or not valid Unicode.
    """
    if not isinstance(salt, str):
        raise RequestError(f'"cache_salt" must be a string; got {shown(salt)}. {_HOW}')
    require_unicode("a cache_salt", salt)
    return salt


def _as_ids(token_ids: Any) -> tuple[int, ...]:
    if isinstance(token_ids, np.ndarray):
        if token_ids.ndim != 1 or (token_ids.size and token_ids.dtype.kind not in "iu"):
            raise RequestError(
                "an array of token ids must hold integers in one dimension; "
                f"got dtype={token_ids.dtype}, shape={token_ids.shape}. {_HOW}"
            )
        return tuple(token_ids.tolist())
    if isinstance(token_ids, str | bytes | bytearray) or not isinstance(token_ids, Sequence):
        raise RequestError(f"token ids must be a list of integers; got {shown(token_ids)}. {_HOW}")
    for position, one in enumerate(token_ids):
        if isinstance(one, bool) or not isinstance(one, int | np.integer):
            raise RequestError(
                f"token ids must be integers; got {shown(one)} at position {position}. {_HOW}"
            )
    return tuple(operator.index(one) for one in token_ids)
