"""Parameters of one request: sampling, stopping and reporting, under vLLM's names."""

import functools
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypeVar

from jinfer.errors import RequestError, shown, unknown_keyword
from jinfer.request.prompt import require_unicode

# Each of the n completions takes a slot; more than a thousand is a typing error.
MAX_N = 1024
# Stop strings are searched in the text of every token: many or long ones cost time.
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
# Stored in rows of fixed size on the device, one per slot, so no request recompiles a step.
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 128  # also the limit on a slot's bad words of two or more tokens
# The usual limit. To ban or force tokens, use bad_words or allowed_token_ids.
MAX_ABS_LOGIT_BIAS = 100.0
# Limits of the divisors of logits, far from the ends of float32 (1e-38 and 1e38).
MIN_DIVISOR = 1e-5
MAX_DIVISOR = 1e6
# Counts are int32 on the device.
MAX_COUNT = 2**31 - 1

_Class = TypeVar("_Class", bound=type)


class RequestOutputKind(Enum):
    """The content of each output of a stream; names and values are vLLM's."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # the part that is new since the last output
    FINAL_ONLY = 2  # one output, at the end, with everything


def _refuse_unknown_keywords(cls: _Class) -> _Class:
    """Makes the constructor name the nearest parameter when a keyword is misspelt."""
    known = {f.name for f in fields(cls)}
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, **keywords: Any) -> None:
        for name in keywords:
            if name not in known:
                raise unknown_keyword(cls.__name__, name, known)
        init(self, **keywords)

    cls.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
    return cls


@_refuse_unknown_keywords
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one request; names, meanings and defaults are vLLM's.

    Differences: `max_tokens=None`, the default, means "until the model stops or the context ends"
    (vLLM's default is 16), and a temperature between 0 and 1e-5 is refused (vLLM raises everything
    below 0.01 to 0.01). Lists may be any iterable and become tuples; `stop` may be one string.

    Order of the transforms: penalties, logit_bias, bad_words and allowed_token_ids, temperature,
    top_k, top_p, min_p, then sample.

    Args:
      n: completions per prompt, 1 to 1024.
      presence_penalty: -2 to 2; subtracted once from the logit of each token of the output.
      frequency_penalty: -2 to 2; subtracted once per earlier occurrence in the output.
      repetition_penalty: above 0; divides the positive and multiplies the negative logits of
        tokens already in the prompt or the output. 1 changes nothing.
      temperature: 0 takes the likeliest token; else at least 1e-5.
      top_p: in (0, 1]; 1 keeps every token.
      top_k: keeps this many of the likeliest tokens; 0 or -1 keeps all.
      min_p: in [0, 1]; drops tokens less likely than this fraction of the top probability.
      seed: any integer of 64 bits; None lets the engine choose.
      stop: strings that end the output.
      stop_token_ids: tokens that end the output, besides the model's own end tokens.
      bad_words: strings that may not be generated.
      ignore_eos: does not stop at the model's own end tokens.
      max_tokens: most output tokens; None = until the model stops or the context ends.
      min_tokens: fewest output tokens; end and stop tokens are forbidden before.
      logprobs: top tokens to report at each output position, besides the sampled one.
      prompt_logprobs: the same at each prompt position.
      detokenize: False leaves the text of outputs empty.
      skip_special_tokens: leaves special tokens out of the text.
      include_stop_str_in_output: keeps the matched stop string at the end of the text.
      logit_bias: token id -> value in [-100, 100] that is added to its logit.
      allowed_token_ids: only these tokens may be generated; None allows all.
      output_kind: content of the outputs that `LLM.stream` and `AsyncLLM` yield. With FINAL_ONLY
        one dispatch may decode many tokens, because no caller waits for single ones.

    Raises:
      RequestError: a value has a wrong type or range, or two values contradict each other.
      TypeError: a keyword is unknown.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            # The only writes to frozen fields: each gets its normal form.
            object.__setattr__(self, name, check(name, getattr(self, name)))
        _refuse_contradictions(self)

    @classmethod
    def from_defaults(cls, defaults: Mapping[str, Any], **chosen: Any) -> "SamplingParams":
        """The checkpoint's sampling defaults (generation_config.json) under the user's choices."""
        return cls(**{**defaults, **chosen})

    def clone(self) -> "SamplingParams":
        """Returns a copy, as in vLLM; `dataclasses.replace` returns one with changes."""
        return replace(self)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, without randomness."""
        return self.temperature == 0.0

    def check_against(
        self, *, vocab_size: int, max_logprobs: int, max_model_len: int, has_tokenizer: bool = True
    ) -> None:
        """Refuses values that this engine or model does not support.

        Args:
          vocab_size: V, the width of the model's logits.
          max_logprobs: the engine's limit on `logprobs` and `prompt_logprobs`.
          max_model_len: tokens of prompt and output together.
          has_tokenizer: False under `skip_tokenizer_init`.

        Raises:
          RequestError: naming the field, its value and the limit.
        """
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise RequestError(
                        f"{name} must lie in the vocabulary; got token id {token_id} with "
                        f"vocab_size={vocab_size}. Use ids below {vocab_size}."
                    )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > max_logprobs:
                raise RequestError(
                    f"{name} must be at most max_logprobs={max_logprobs}; got {name}={count}. "
                    "Ask for fewer, or raise max_logprobs of the engine."
                )
        # A prompt has at least one token, so the output has at most one less than the context.
        if self.min_tokens >= max_model_len:
            raise RequestError(
                f"min_tokens must be below max_model_len={max_model_len}; "
                f"got min_tokens={self.min_tokens}. Lower it."
            )
        for name in ("stop", "bad_words"):
            if getattr(self, name) and not has_tokenizer:
                raise RequestError(
                    f"{name} needs a tokenizer; got {name}={getattr(self, name)!r} with "
                    "skip_tokenizer_init=True. Use stop_token_ids or logit_bias."
                )


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(f"{name} must be an integer; got {name}={shown(value)}. Pass an int.")
    return operator.index(value)


def _integer_within(low: int, high: int, *, or_none: bool = False) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> int | None:
        if or_none and value is None:
            return None
        number = _integer(name, value)
        if not low <= number <= high:
            # Python refuses to print integers of thousands of digits.
            shown = number if number.bit_length() < 200 else f"{number.bit_length()} bits"
            raise RequestError(
                f"{name} must be in [{low}, {high}]; got {name}={shown}. Choose a value in it."
            )
        return number

    return check


def _number_within(low: float, high: float, *, above: bool = False) -> Callable[[str, Any], float]:
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


def _temperature(name: str, value: Any) -> float:
    number = _number_within(0.0, MAX_DIVISOR)(name, value)
    if 0.0 < number < MIN_DIVISOR:
        raise RequestError(
            f"temperature must be 0 or at least {MIN_DIVISOR:g}; got temperature={number}. "
            "Use 0 for the likeliest token."
        )
    return number


def _top_k(name: str, value: Any) -> int:
    return max(0, _integer_within(-1, MAX_COUNT)(name, value))


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be True or False; got {name}={shown(value)}. Pass a bool.")
    return value


def _output_kind(name: str, value: Any) -> RequestOutputKind:
    value = value.value if isinstance(value, Enum) else value  # vLLM's enum has the same values
    try:
        return RequestOutputKind(_integer(name, value))
    except (RequestError, ValueError):
        names = ", ".join(kind.name for kind in RequestOutputKind)
        raise RequestError(
            f"{name} must be one of {names}; got {name}={shown(value)}. Pass a RequestOutputKind."
        ) from None


def _listed(name: str, value: Any, of: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(
            f"{name} must be a list of {of}; got {name}={shown(value)}. Pass a list."
        )
    return tuple(value)


def _at_most(name: str, values: Any, limit: int) -> None:
    if len(values) > limit:
        raise RequestError(
            f"{name} holds at most {limit} entries; got {len(values)}. Pass fewer of them."
        )


def _strings(limit: int) -> Callable[[str, Any], tuple[str, ...]]:
    def check(name: str, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        texts = (value,) if isinstance(value, str) else _listed(name, value, "strings")
        _at_most(name, texts, limit)
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


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    check = _integer_within(0, MAX_COUNT)
    ids = [check(f"{name}[{i}]", one) for i, one in enumerate(_listed(name, value, "token ids"))]
    return tuple(dict.fromkeys(ids))


def _stop_token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = () if value is None else _token_ids(name, value)
    _at_most(name, ids, MAX_STOP_TOKEN_IDS)
    return ids


def _allowed_token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = _token_ids(name, value)
    if not ids:
        raise RequestError(
            "allowed_token_ids must allow at least one token; got an empty list. "
            "Pass None to allow all."
        )
    return ids


def _logit_bias(name: str, value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(
            f"logit_bias must map token ids to numbers; got logit_bias={shown(value)}. Pass a dict."
        )
    _at_most(name, value, MAX_LOGIT_BIASES)
    is_id = _integer_within(0, MAX_COUNT)
    within = _number_within(-MAX_ABS_LOGIT_BIAS, MAX_ABS_LOGIT_BIAS)
    bias = {}
    for key, number in value.items():
        # JSON has no integer keys; requests from a network have text.
        is_text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token_id = is_id("a key of logit_bias", int(key) if is_text else key)
        bias[token_id] = within(f"{name}[{token_id}]", number)
    return bias or None


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "n": _integer_within(1, MAX_N),
    "presence_penalty": _number_within(-2.0, 2.0),
    "frequency_penalty": _number_within(-2.0, 2.0),
    "repetition_penalty": _number_within(MIN_DIVISOR, MAX_DIVISOR),
    "temperature": _temperature,
    "top_p": _number_within(0.0, 1.0, above=True),
    "top_k": _top_k,
    "min_p": _number_within(0.0, 1.0),
    "seed": _integer_within(-(2**63), 2**64 - 1, or_none=True),
    "stop": _strings(MAX_STOP_STRINGS),
    "stop_token_ids": _stop_token_ids,
    "bad_words": _strings(MAX_BAD_WORDS),
    "ignore_eos": _flag,
    "max_tokens": _integer_within(1, MAX_COUNT, or_none=True),
    "min_tokens": _integer_within(0, MAX_COUNT),
    "logprobs": _integer_within(0, MAX_COUNT, or_none=True),
    "prompt_logprobs": _integer_within(0, MAX_COUNT, or_none=True),
    "detokenize": _flag,
    "skip_special_tokens": _flag,
    "include_stop_str_in_output": _flag,
    "logit_bias": _logit_bias,
    "allowed_token_ids": _allowed_token_ids,
    "output_kind": _output_kind,
}


def _refuse_contradictions(params: SamplingParams) -> None:
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            "min_tokens must not exceed max_tokens; got "
            f"min_tokens={params.min_tokens}, max_tokens={params.max_tokens}. Lower min_tokens."
        )
    if params.stop and not params.detokenize:
        raise RequestError(
            f"stop strings are searched in the text; got stop={list(params.stop)} with "
            "detokenize=False. Use stop_token_ids, or leave detokenize on."
        )
    allowed = params.allowed_token_ids
    if allowed is not None and params.min_tokens and set(allowed) <= set(params.stop_token_ids):
        raise RequestError(
            "allowed_token_ids must allow a token that does not stop while min_tokens forbids "
            f"stopping; got allowed_token_ids={list(allowed)}, min_tokens={params.min_tokens}. "
            "Allow one more token, or set min_tokens=0."
        )


# Every field has its check, or the class does not import.
assert [f.name for f in fields(SamplingParams)] == list(_CHECKS), "fields without a check"


def priorities_for(num_prompts: int, priority: Any) -> Sequence[int]:
    """The priority of each prompt; 0 where none is given.

    Raises:
      RequestError: it is not one integer per prompt.
    """
    if priority is None:
        return [0] * num_prompts
    if not isinstance(priority, Sequence) or not all(type(one) is int for one in priority):
        raise RequestError(
            f"priority must be a list of integers; got priority={priority!r:.60}. "
            "Pass one integer per prompt."
        )
    if len(priority) != num_prompts:
        raise RequestError(
            f"priority needs one entry per prompt; got {len(priority)} for {num_prompts} prompts. "
            "Pass one each."
        )
    return priority


def check_priority(priority: Any) -> None:
    """Refuses a priority that is not an integer.

    Raises:
      RequestError: it is not an integer.
    """
    if type(priority) is not int:
        raise RequestError(f"a priority must be an integer; got {shown(priority)}. Pass an int.")
