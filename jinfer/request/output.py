"""The outputs of a request, under vLLM's names."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

_SHOWN_CHARS = 200
_SHOWN_IDS = 16


@dataclass(frozen=True, slots=True)
class Logprob:
    """Probability and rank of one token.

    Args:
      logprob: natural logarithm of its probability.
      rank: 1 is the likeliest; None if not requested.
      decoded_token: text of this token alone; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """Times and token counts of a request; always recorded.

    Times are seconds of `time.monotonic()`, so changes of the wall clock do not affect durations;
    `wall_origin + t` is the same moment in seconds of `time.time()`. None: not yet.
    """

    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    wall_origin: float = field(default_factory=lambda: time.time() - time.monotonic())
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_output_tokens: int = 0  # over all completions

    @property
    def queue_s(self) -> float | None:
        """Time from arrival to the request's first step."""
        return self._since_arrival(self.first_scheduled_time)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from arrival until the host has the first token."""
        return self._since_arrival(self.first_token_time)

    @property
    def e2e_s(self) -> float | None:
        """End to end: from arrival to the last token."""
        return self._since_arrival(self.finished_time)

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (e2e - ttft) / (tokens - 1).

        None for fewer than two tokens. With n > 1 the tokens of all completions count.
        """
        if self.e2e_s is None or self.ttft_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)

    def _since_arrival(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self.arrival_time


@dataclass(kw_only=True, slots=True, repr=False)
class CompletionOutput:
    """One of the n completions of a request.

    Args:
      index: its number, 0 to n - 1.
      text: without the stop string, unless `include_stop_str_in_output` is set. If the tokens end
        inside a character, it ends with U+FFFD.
      token_ids: includes the token that ended it.
      cumulative_logprob: sum over token_ids; None unless logprobs were requested.
      logprobs: for each token, the reported tokens by id.
      finish_reason: "stop", "length", "abort" or "error"; None while running.
      stop_reason: the stop string, or the stop token's id; None for the model's own end token and
        for other reasons.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether the completion is finished."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, text={_shown_text(self.text)}, "
            f"token_ids={_shown_ids(self.token_ids)}, "
            f"cumulative_logprob={self.cumulative_logprob}, "
            f"finish_reason={_plain(self.finish_reason)}, stop_reason={self.stop_reason!r})"
        )


@dataclass(kw_only=True, slots=True, repr=False)
class RequestOutput:
    """The result of one request, final or so far.

    Args:
      request_id: unique in its engine.
      prompt: its text; None if only token ids were given.
      prompt_token_ids: the model's input, special tokens included.
      prompt_logprobs: for each prompt token; None for the first, which has no prediction.
      outputs: the n completions, by index.
      finished: whether all completions are finished.
      metrics: times and token counts.
      num_cached_tokens: prompt tokens found in the prefix cache.
      error: the reason of a failure, with on_error="return"; else None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    error: Exception | None = None

    def __repr__(self) -> str:
        error = "" if self.error is None else f", error={self.error!r}"
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={_shown_text(self.prompt)}, "
            f"prompt_token_ids={_shown_ids(self.prompt_token_ids)}, outputs={self.outputs!r}, "
            f"finished={self.finished}, num_cached_tokens={self.num_cached_tokens}{error})"
        )


def new_since(output: RequestOutput, before: RequestOutput | None) -> RequestOutput:
    """Returns an output with only the text, tokens and logprobs that are new since `before`."""
    if before is None:
        return output
    old_prompt = before.prompt_logprobs or []
    return replace(
        output,
        prompt_logprobs=output.prompt_logprobs and output.prompt_logprobs[len(old_prompt) :],
        outputs=[
            replace(
                new,
                text=new.text[len(old.text) :],
                token_ids=new.token_ids[len(old.token_ids) :],
                logprobs=new.logprobs and new.logprobs[len(old.logprobs or ()) :],
            )
            for new, old in zip(output.outputs, before.outputs, strict=True)
        ],
    )


def _shown_text(text: str | None) -> str:
    if text is None or len(text) <= _SHOWN_CHARS:
        return repr(text)
    return f"{text[:_SHOWN_CHARS]!r}... ({len(text)} characters)"


def _shown_ids(token_ids: Sequence[int]) -> str:
    if len(token_ids) <= _SHOWN_IDS:
        return str(list(token_ids))
    first = ", ".join(map(str, token_ids[:_SHOWN_IDS]))
    return f"[{first}, ... ({len(token_ids)} ids)]"


def _plain(reason: str | None) -> str:
    """Quotes a reason as a string, also a member of an enum."""
    return repr(None if reason is None else str(reason))
