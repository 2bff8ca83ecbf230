"""Builds a slot's row of SamplingState from one sequence's sampling parameters."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jinfer.errors import RequestError, shown
from jinfer.request.params import SamplingParams
from jinfer.sampling import masks
from jinfer.sampling.sampler import SamplingState, empty_state
from jinfer.schedule.sequence import TokenSequence


def sampling_row(
    params: SamplingParams,
    sequence: TokenSequence,
    *,
    seed: int,
    stop_ids: Sequence[int],
    bad_words: Sequence[Sequence[int]],
    vocab_size: int,
) -> SamplingState:
    """Builds the row that `write_slots` writes, its leaves without the slot axis.

    Args:
      params: the user's parameters, already checked.
      sequence: its prompt, its index among the n completions, and any output it resumes with.
      seed: the request's seed, or the engine's random choice for it.
      stop_ids: end tokens of the model and of the request; banned before min_tokens.
      bad_words: token ids of every banned word.
      vocab_size: V.

    Raises:
      RequestError: a list is too long for its slot, or a token id is outside the vocabulary.
    """
    nothing = dataclasses.replace(empty_state(1, vocab_size, xp=np), output_count_AV=None)
    row = jax.tree.map(lambda leaf_1: leaf_1[0], nothing)
    banned_ids = [word[0] for word in bad_words if len(word) == 1]
    bias_ids_J, bias_values_J = masks.pad_bias(params.logit_bias or {}, vocab_size)
    return dataclasses.replace(
        row,
        temperature_A=params.temperature,
        top_k_A=max(params.top_k, 0),
        top_p_A=params.top_p,
        min_p_A=params.min_p,
        repetition_penalty_A=params.repetition_penalty,
        presence_penalty_A=params.presence_penalty,
        frequency_penalty_A=params.frequency_penalty,
        seed_A2=masks.seed_words(seed, sequence.index),
        min_length_A=sequence.num_prompt_tokens + params.min_tokens,
        stop_ids_AJ=masks.pad_stop_ids(stop_ids, vocab_size),
        bias_ids_AJ=bias_ids_J,
        bias_values_AJ=bias_values_J,
        allowed_bits_AW=masks.allowed_bits(
            vocab_size, allowed_ids=params.allowed_token_ids, banned_ids=banned_ids
        ),
        bad_words_AJ8=masks.pad_bad_words([w for w in bad_words if len(w) > 1], vocab_size),
        prompt_bits_AW=masks.pack_bits(sequence.prompt_ids, vocab_size),
        recent_A7=masks.recent_window(sequence.output_ids, vocab_size),
    )


def check_row(
    params: SamplingParams,
    stop_ids: Sequence[int],
    bad_words: Sequence[Sequence[int]],
    vocab_size: int,
) -> None:
    """Rejects a request that does not fit a slot's row, before it is queued.

    Raises:
      RequestError: as `sampling_row` would; or no token can be sampled before min_tokens.
    """
    masks.pad_stop_ids(stop_ids, vocab_size)
    allowed = params.allowed_token_ids
    if allowed is not None:
        _refuse_dead_ends(params, allowed, stop_ids, bad_words)
    if params.logit_bias:
        masks.pad_bias(params.logit_bias, vocab_size)
    if allowed is not None or bad_words:
        banned_ids = [word[0] for word in bad_words if len(word) == 1]
        masks.allowed_bits(vocab_size, allowed_ids=allowed, banned_ids=banned_ids)
        masks.pad_bad_words([w for w in bad_words if len(w) > 1], vocab_size)


def _refuse_dead_ends(
    params: SamplingParams,
    allowed: Sequence[int],
    stop_ids: Sequence[int],
    bad_words: Sequence[Sequence[int]],
) -> None:
    """Requires an allowed token that is never banned: it ends no bad word, and is no stop token.

    Stricter than necessary: a bad word of several tokens bans its last token only after the others.
    So if each of two allowed tokens is banned only after the other, one of them could be repeated.
    """
    enders = {word[-1] for word in bad_words}
    unstoppable = set(stop_ids) if params.min_tokens else set()
    if set(allowed) <= unstoppable:
        raise RequestError(
            "allowed_token_ids must allow a token that does not stop while min_tokens forbids "
            f"stopping; got allowed_token_ids={list(allowed)}, min_tokens={params.min_tokens}, and "
            f"stop tokens {sorted(stop_ids)}. Allow one more token, or set min_tokens=0."
        )
    if set(allowed) <= unstoppable | enders:
        raise RequestError(
            "allowed_token_ids must allow a token that ends no bad word and, under min_tokens, "
            f"does not stop; got allowed_token_ids={shown(list(allowed))}, "
            f"bad_words={shown(list(params.bad_words))}, min_tokens={params.min_tokens}. "
            "Allow one more token, or drop a bad word."
        )
