"""Fields of vLLM's SamplingParams that jinfer's does not have.

Each is accepted at values that ask for what jinfer does anyway, vLLM's default among them. Any
other value is refused in one sentence.
"""

from collections.abc import Mapping
from typing import Any

from jinfer.errors import RequestError, shown

# Field -> the accepted values, and the advice for any other.
_SETTLED: dict[str, tuple[tuple[Any, ...], str]] = {
    "spaces_between_special_tokens": ((True, False), "No space is ever added."),
    "skip_clone": ((True, False), "Parameters never change, so a copy is never needed."),
    "output_text_buffer_length": ((0,), "Text is held back as stop strings need it."),
    "flat_logprobs": ((False,), "Logprobs are a list of dicts."),
    "logprob_token_ids": ((None,), "Use logprobs, which reports the likeliest tokens."),
    "prompt_logprob_token_ids": ((None,), "Use prompt_logprobs, which reports the likeliest."),
    "prompt_logprob_start": ((None, 0), "Use prompt_logprobs, and drop its first entries."),
    "stream_interval": (
        (None, 1),
        "Use RequestOutputKind.FINAL_ONLY, or join outputs.",
    ),
    "structured_outputs": ((None,), "Structured output is not served yet; check the text after."),
    "guided_decoding": ((None,), "Structured output is not served yet; check the text after."),
    "logits_processors": ((None, [], ()), "Use logit_bias, bad_words or allowed_token_ids."),
    "extra_args": ((None, {}), "Nothing reads it."),
    "skip_reading_prefix_cache": (
        (None, False),
        'Give the prompt a "cache_salt" of its own, or set enable_prefix_caching=False.',
    ),
    "thinking_token_budget": ((None, -1), "Limit the whole output with max_tokens."),
    "repetition_detection": ((None,), "Use repetition_penalty or frequency_penalty."),
    "routed_experts_prompt_start": ((0,), "Routed experts are not reported."),
    "trace_decode_token_ids": ((None,), "To score given tokens, put them into the prompt."),
    "truncate_prompt_tokens": ((None,), "Truncate the prompt's token ids before the call."),
    "best_of": ((None, 1), "Use n, and choose by cumulative_logprob."),
    "use_beam_search": ((False,), "Beam search is not served yet; use n."),
    "length_penalty": ((1.0,), "It belongs to beam search, which is not served yet."),
    "early_stopping": ((False,), "It belongs to beam search, which is not served yet."),
}
VLLM_ONLY = frozenset(_SETTLED)


def settled(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords without the fields that only vLLM has.

    Raises:
      RequestError: one of these asks for something that jinfer does not do.
    """
    kept = {}
    for name, value in keywords.items():
        if name not in _SETTLED:
            kept[name] = value
            continue
        accepted, advice = _SETTLED[name]
        if not any(_same(value, one) for one in accepted):
            raise RequestError(
                f"{name} must be {' or '.join(map(repr, accepted))}; got {name}={shown(value)}. "
                f"{advice}"
            )
    return kept


def _same(value: Any, other: Any) -> bool:
    """Whether both are equal; True is not 1, but 1 is 1.0."""
    plain = {int: float}
    kinds = (plain.get(type(one), type(one)) for one in (value, other))
    return len(set(kinds)) == 1 and value == other
