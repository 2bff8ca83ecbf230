"""Parameters of one request: sampling, stopping and reporting, under vLLM's names."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypeVar

from jinfer.errors import RequestError, shown, unknown_keyword
from jinfer.request import param_checks as checks
from jinfer.request.param_checks import MAX_COUNT
from jinfer.request.vllm_params import settled

ALL_TOKENS = -1  # of `logprobs`: every token of the vocabulary
_Class = TypeVar("_Class", bound=type)


class RequestOutputKind(Enum):
    """The content of each output of a stream; names and values are vLLM's."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # the part that is new since the last output
    FINAL_ONLY = 2  # one output, at the end, with everything


def _with_advice(cls: _Class) -> _Class:
    """Makes errors of the constructor and of assignment name the right thing to write.

    The constructor also takes vLLM's other fields, and names the nearest for a misspelt one.
    """
    known = {f.name for f in fields(cls)}
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, **keywords: Any) -> None:
        keywords = settled(keywords)
        for name in keywords:
            if name not in known:
                raise unknown_keyword(cls.__name__, name, known)
        init(self, **keywords)

    def refuse(self: Any, name: str, value: Any) -> None:
        raise FrozenInstanceError(
            f"{cls.__name__} cannot be changed; got an assignment to {name}. "
            f"Write params = params.replace({name}=...)."
        )

    cls.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
    cls.__setattr__ = refuse  # pyright: ignore[reportAttributeAccessIssue]
    return cls


@_with_advice
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one request; names, meanings and defaults are vLLM's.

    Differences: `max_tokens=None`, the default, means "until the model stops or the context ends"
    (vLLM's default is 16), and a temperature between 0 and 1e-5 is refused (vLLM takes 0.01 for one
    between 0 and 0.01). Lists may be any iterable and become tuples; `stop` may be one string.
    Further fields of vLLM are accepted at values that change nothing, such as their defaults (see
    `jinfer.request.vllm_params`). To change a field, use `replace`.

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
      seed: any integer of 64 bits; None or -1 lets the engine choose.
      stop: strings that end the output. A string that is exactly one special token ends it also
        where `skip_special_tokens` hides that token.
      stop_token_ids: tokens that end the output, besides the model's own end tokens.
      bad_words: words or phrases that the output may not contain, however they are cut into
        tokens, at its start and after spaces, punctuation or other tokens. Case counts; spaces
        before a word do not. A longer word within one token is not banned: "cat" allows the token
        "concatenate", as in vLLM, but no token "cat", even if "s" would follow. "Longer" means a
        letter with case, or a digit, on both sides of the word's edge.
      ignore_eos: does not stop at the model's own end tokens: those of the checkpoint's configs,
        and the tokenizer's.
      max_tokens: most output tokens; None = until the model stops or the context ends.
      min_tokens: fewest output tokens; end and stop tokens are forbidden before.
      logprobs: top tokens to report at each output position, besides the sampled one; -1 = all,
        if the engine's max_logprobs is as large as the vocabulary.
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

    @classmethod
    def from_optional(cls, **chosen: Any) -> "SamplingParams":
        """As the constructor, but None stands for the default of every field."""
        return cls(**{name: value for name, value in chosen.items() if value is not None})

    def clone(self) -> "SamplingParams":
        """Returns a copy, as in vLLM."""
        return replace(self)

    def replace(self, **changes: Any) -> "SamplingParams":
        """Returns a copy with some fields changed, checked as by the constructor."""
        return replace(self, **changes)

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
            all_of_them = f", all {vocab_size} tokens" if count == ALL_TOKENS else ""
            if count is not None and (vocab_size if all_of_them else count) > max_logprobs:
                raise RequestError(
                    f"{name} must be at most max_logprobs={max_logprobs}; got {name}={count}"
                    f"{all_of_them}. Ask for fewer, or raise max_logprobs of the engine, to "
                    f"{checks.MAX_LOGPROBS} at most."
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


def _output_kind(name: str, value: Any) -> RequestOutputKind:
    value = value.value if isinstance(value, Enum) else value  # vLLM's enum has the same values
    try:
        return RequestOutputKind(checks.integer(name, value))
    except (RequestError, ValueError):
        names = ", ".join(kind.name for kind in RequestOutputKind)
        raise RequestError(
            f"{name} must be one of {names}; got {name}={shown(value)}. Pass a RequestOutputKind."
        ) from None


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "n": checks.integer_within(1, checks.MAX_N),
    "presence_penalty": checks.number_within(-2.0, 2.0),
    "frequency_penalty": checks.number_within(-2.0, 2.0),
    "repetition_penalty": checks.number_within(checks.MIN_DIVISOR, checks.MAX_DIVISOR),
    "temperature": checks.temperature,
    "top_p": checks.number_within(0.0, 1.0, above=True),
    "top_k": checks.top_k,
    "min_p": checks.number_within(0.0, 1.0),
    "seed": checks.seed,
    "stop": checks.strings(checks.MAX_STOP_STRINGS),
    "stop_token_ids": checks.stop_token_ids,
    "bad_words": checks.strings(checks.MAX_BAD_WORDS),
    "ignore_eos": checks.flag,
    "max_tokens": checks.integer_within(1, MAX_COUNT, or_none=True),
    "min_tokens": checks.integer_within(0, MAX_COUNT),
    "logprobs": checks.integer_within(ALL_TOKENS, MAX_COUNT, or_none=True),
    "prompt_logprobs": checks.integer_within(ALL_TOKENS, MAX_COUNT, or_none=True),
    "detokenize": checks.flag,
    "skip_special_tokens": checks.flag,
    "include_stop_str_in_output": checks.flag,
    "logit_bias": checks.logit_bias,
    "allowed_token_ids": checks.allowed_token_ids,
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
