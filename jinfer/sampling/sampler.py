"""Samples one token per row of logits. Pure; a request's parameters are arrays.

The order is public and fixed: repetition, presence and frequency penalties; logit bias; bad words
and allowed ids; the ban of stop ids before min_tokens; temperature; top-k; top-p; min-p; sampling.
Each part runs only in steps in which some row needs it, and leaves the other rows as they are: a
row's token depends only on its own logits, parameters, history and position.

If several chips shard the vocabulary, each computes its own part of [R, V]. The chips exchange only
a few numbers per row: sums, maxima, and the weights of blocks of 128 tokens.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jinfer.parallel.collectives import WHOLE, Shards
from jinfer.request.param_checks import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from jinfer.sampling.masks import (
    MAX_LOGIT_BIAS,
    MAX_STOP_IDS,
    WINDOW,
    WORD_BITS,
    num_words,
)
from jinfer.sampling.threefry import fold_in, random_bits
from jinfer.sampling.threshold import top_k_threshold, top_p_threshold
from jinfer.sampling.xla_workarounds import distinct_ids, row_major, rows_one_by_one

NAN_TOKEN = -1  # in place of a token, if the logits are NaN
_LANES = 128  # tokens per block of two-level sampling
_LARGEST = float(jnp.finfo(jnp.float32).max)


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingState:
    """Each slot's sampling parameters and token history. The last row is the null slot.

    Lists are padded with V (`jinfer.sampling.masks` builds them). Admission writes every field;
    `record` updates the last two. A shard has its part of V and W.
    """

    temperature_A: Float[Array, "A"]  # 0 = the most probable token
    top_k_A: Int32[Array, "A"]  # 0 = off
    top_p_A: Float[Array, "A"]  # 1 = off
    min_p_A: Float[Array, "A"]  # 0 = off
    repetition_penalty_A: Float[Array, "A"]  # 1 = off; over prompt and output
    presence_penalty_A: Float[Array, "A"]  # 0 = off; over the output
    frequency_penalty_A: Float[Array, "A"]  # 0 = off; over the output
    seed_A2: UInt32[Array, "A 2"]  # masks.seed_words
    min_length_A: Int32[Array, "A"]  # positions below it may not take a stop id
    stop_ids_AJ: Int32[Array, "A J"]  # J = MAX_STOP_IDS
    bias_ids_AJ: Int32[Array, "A J"]  # J = MAX_LOGIT_BIAS
    bias_values_AJ: Float[Array, "A J"]
    allowed_bits_AW: UInt32[Array, "A W"]  # all ones = every token is allowed
    bad_words_AJ8: Int32[Array, "A J 8"]  # masks.pad_bad_words; J = MAX_BAD_WORDS
    prompt_bits_AW: UInt32[Array, "A W"]  # tokens that occur in the prompt
    recent_A7: Int32[Array, "A 7"]  # last tokens sampled, newest last, padded with V
    output_count_AV: Int32[Array, "A V"]  # how often each token was sampled


def empty_state(num_rows: int, vocab_size: int, xp: ModuleType = jnp) -> SamplingState:
    """Rows with default parameters: the most probable token, no penalty, everything allowed.

    Args:
      num_rows: A, the slots and the null slot; or the rows of one admission.
      vocab_size: V, the width of the logits.
      xp: `numpy` builds rows on the host, for the caller to change.
    """

    def full(value: int, dtype: str, *rest: int) -> Any:
        return xp.full((num_rows, *rest), value, dtype=dtype)

    words = num_words(vocab_size)
    return SamplingState(
        temperature_A=full(0, "float32"),
        top_k_A=full(0, "int32"),
        top_p_A=full(1, "float32"),
        min_p_A=full(0, "float32"),
        repetition_penalty_A=full(1, "float32"),
        presence_penalty_A=full(0, "float32"),
        frequency_penalty_A=full(0, "float32"),
        seed_A2=full(0, "uint32", 2),
        min_length_A=full(0, "int32"),
        stop_ids_AJ=full(vocab_size, "int32", MAX_STOP_IDS),
        bias_ids_AJ=full(vocab_size, "int32", MAX_LOGIT_BIAS),
        bias_values_AJ=full(0, "float32", MAX_LOGIT_BIAS),
        allowed_bits_AW=full(0xFFFFFFFF, "uint32", words),
        bad_words_AJ8=full(vocab_size, "int32", MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
        prompt_bits_AW=full(0, "uint32", words),
        recent_A7=full(vocab_size, "int32", WINDOW),
        output_count_AV=full(0, "int32", vocab_size),
    )


def sample(
    logits_RV: Float[Array, "R V"],
    state: SamplingState,
    slot_R: Int32[Array, "R"],
    position_R: Int32[Array, "R"],
    shards: Shards = WHOLE,
) -> Int32[Array, "R"]:
    """Samples one token per row of logits, in the order of the module's docstring.

    Ties: top-k and top-p keep every token that ties with the last one kept; temperature 0 takes
    the lowest id among equals. +inf counts as the largest float32. A row with a NaN among the
    allowed ids gives NAN_TOKEN; a row without a possible token (all -inf or banned) gives 0.

    Args:
      logits_RV: any float dtype; computed in float32.
      state: parameters and history of every slot.
      slot_R: the slot of each row of logits; the null slot for padding.
      position_R: position of the sampled token: the number of tokens before it.
      shards: the shards of V.

    Raises:
      ValueError: if `state` was made for another vocabulary.

    Source: repetition penalty: Keskar et al., arXiv:1909.05858, section 4.1; top-k: Fan et al.,
      arXiv:1805.04833; top-p: Holtzman et al., arXiv:1904.09751; min-p: Nguyen et al.,
      arXiv:2407.01082.
    """
    length = logits_RV.shape[-1]
    if state.output_count_AV.shape[-1] != length:
        raise ValueError(
            "SamplingState must be as wide as the logits; "
            f"got V={state.output_count_AV.shape[-1]} for logits of V={length}. "
            "Build it with empty_state(num_rows, vocab_size) of this model."
        )
    vocab_size = shards.whole(length)
    edits = (
        (_needs_penalties(state, slot_R), lambda x_RV: _penalise(x_RV, state, slot_R)),
        (
            state.bias_ids_AJ[slot_R, 0] < vocab_size,
            lambda x_RV: _add_bias(x_RV, state, slot_R, shards),
        ),
        (_needs_mask(state, slot_R), lambda x_RV: _keep_allowed(x_RV, state, slot_R)),
        (
            _needs_bans(state, slot_R, position_R, vocab_size),
            lambda x_RV: _ban(x_RV, state, slot_R, position_R, shards),
        ),
    )
    logits_RV = row_major(logits_RV.astype(jnp.float32))
    # Shards may disagree on whether a mask is needed, so edits must use no collectives.
    for needed_R, edit in edits:
        logits_RV = lax.cond(jnp.any(needed_R), edit, lambda same_RV: same_RV, logits_RV)
    likeliest_R = _argmax(logits_RV, shards)
    random_R = state.temperature_A[slot_R] > 0.0
    return lax.cond(
        jnp.any(random_R),
        lambda: jnp.where(
            random_R & (likeliest_R != NAN_TOKEN),
            _sample_random(logits_RV, state, slot_R, position_R, shards),
            likeliest_R,
        ),
        lambda: likeliest_R,
    )


def record(
    state: SamplingState,
    slot_R: Int32[Array, "R"],
    token_R: Int32[Array, "R"],
    sampled_R: Bool[Array, "R"],
    shards: Shards = WHOLE,
) -> SamplingState:
    """Adds the sampled tokens to their slots' history, in place if `state` is donated.

    A slot may sample once per call. Rows that sampled nothing write only to the null slot.
    """
    null_slot = state.temperature_A.shape[0] - 1
    slot_R = jnp.where(sampled_R, slot_R, null_slot)
    window_R7 = jnp.concatenate([state.recent_A7[slot_R, 1:], token_R[:, None]], axis=-1)
    local_R = shards.local(token_R, state.output_count_AV.shape[-1])
    return dataclasses.replace(
        state,
        recent_A7=state.recent_A7.at[slot_R].set(window_R7),
        output_count_AV=state.output_count_AV.at[slot_R, local_R].add(1, mode="drop"),
    )


def unpack_bits(bits_RW: UInt32[Array, "R W"], vocab_size: int) -> Bool[Array, "R V"]:
    """Unpacks a vocabulary mask to one bool per token."""
    lane = jnp.arange(WORD_BITS, dtype=jnp.uint32)
    flag_RW32 = (bits_RW[:, :, None] >> lane) & 1
    return flag_RW32.reshape(bits_RW.shape[0], -1)[:, :vocab_size].astype(bool)


def _clean(logits_RV: Array) -> Array:
    """Replaces NaN by -inf and +inf by the largest float32."""
    return row_major(jnp.where(jnp.isnan(logits_RV), -jnp.inf, jnp.minimum(logits_RV, _LARGEST)))


def _argmax(logits_RV: Array, shards: Shards) -> Array:
    """Lowest id of the largest logit, or NAN_TOKEN, which is lower than all, if one is NaN.

    Two plain reductions: a third of the time of jnp.argmax.
    """
    length = logits_RV.shape[-1]
    largest_R = shards.max(jnp.max(_clean(logits_RV), axis=-1))
    id_V = shards.start(length) + jnp.arange(length, dtype=jnp.int32)
    reached_RV = logits_RV >= largest_R[:, None]  # false for NaN, true if all are -inf
    others_RV = jnp.where(jnp.isnan(logits_RV), NAN_TOKEN, shards.whole(length))
    return shards.min(jnp.min(jnp.where(reached_RV, id_V, others_RV), axis=-1))


def _needs_penalties(state: SamplingState, slot_R: Array) -> Array:
    repetition_R = state.repetition_penalty_A[slot_R] != 1.0
    presence_R = state.presence_penalty_A[slot_R] != 0.0
    return repetition_R | presence_R | (state.frequency_penalty_A[slot_R] != 0.0)


def _penalise(logits_RV: Array, state: SamplingState, slot_R: Array) -> Array:
    count_RV = lax.platform_dependent(
        state.output_count_AV,
        slot_R,
        tpu=rows_one_by_one,
        default=lambda all_AV, at_R: all_AV[at_R],
    )
    in_prompt_RV = unpack_bits(state.prompt_bits_AW[slot_R], logits_RV.shape[-1])
    repetition_R1 = state.repetition_penalty_A[slot_R, None]
    presence_R1 = state.presence_penalty_A[slot_R, None]
    frequency_R1 = state.frequency_penalty_A[slot_R, None]
    pushed_RV = jnp.where(logits_RV > 0.0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    logits_RV = jnp.where(in_prompt_RV | (count_RV > 0), pushed_RV, logits_RV)
    logits_RV = logits_RV - frequency_R1 * count_RV.astype(jnp.float32)
    return row_major(logits_RV - presence_R1 * (count_RV > 0).astype(jnp.float32))


def _add_bias(logits_RV: Array, state: SamplingState, slot_R: Array, shards: Shards) -> Array:
    row_R1 = jnp.arange(slot_R.shape[0])[:, None]
    length = logits_RV.shape[-1]
    ids_RJ = shards.local(state.bias_ids_AJ[slot_R], length)
    ids_RJ = distinct_ids(ids_RJ, ids_RJ >= length, length)  # a bias has no id twice
    values_RJ = state.bias_values_AJ[slot_R]
    biased_RV = logits_RV.at[row_R1, ids_RJ].add(values_RJ, mode="drop", unique_indices=True)
    return row_major(biased_RV)


def _needs_mask(state: SamplingState, slot_R: Array) -> Array:
    return jnp.any(state.allowed_bits_AW[slot_R] != jnp.uint32(0xFFFFFFFF), axis=-1)


def _keep_allowed(logits_RV: Array, state: SamplingState, slot_R: Array) -> Array:
    allowed_RV = unpack_bits(state.allowed_bits_AW[slot_R], logits_RV.shape[-1])
    return row_major(jnp.where(allowed_RV, logits_RV, -jnp.inf))


def _needs_bans(state: SamplingState, slot_R: Array, position_R: Array, vocab_size: int) -> Array:
    has_bad_words_R = state.bad_words_AJ8[slot_R, 0, -1] < vocab_size
    return has_bad_words_R | (position_R < state.min_length_A[slot_R])


def _ban(
    logits_RV: Array, state: SamplingState, slot_R: Array, position_R: Array, shards: Shards
) -> Array:
    """Bans tokens that would complete a bad word, and stop ids before the minimum length."""
    length = logits_RV.shape[-1]
    vocab_size = shards.whole(length)
    bad_words_RJ8 = state.bad_words_AJ8[slot_R]
    prefix_RJ7, last_RJ = bad_words_RJ8[:, :, :-1], bad_words_RJ8[:, :, -1]
    same_RJ7 = (prefix_RJ7 == state.recent_A7[slot_R, None]) | (prefix_RJ7 == vocab_size)
    completed_RJ = jnp.where(jnp.all(same_RJ7, axis=-1), last_RJ, vocab_size)
    early_R1 = (position_R < state.min_length_A[slot_R])[:, None]
    stop_RJ = jnp.where(early_R1, state.stop_ids_AJ[slot_R], vocab_size)
    banned_RJ = shards.local(jnp.concatenate([completed_RJ, stop_RJ], axis=-1), length)
    same_RJJ = banned_RJ[:, :, None] == banned_RJ[:, None, :]
    repeated_RJ = jnp.any(jnp.tril(same_RJJ, k=-1), axis=-1)
    banned_RJ = distinct_ids(banned_RJ, repeated_RJ | (banned_RJ >= length), length)
    banned = logits_RV.at[jnp.arange(slot_R.shape[0])[:, None], banned_RJ]
    # min, not set: for 128 rows, XLA for TPUs compiles a set five times as long.
    return row_major(banned.min(-jnp.inf, mode="drop", unique_indices=True))


def _sample_random(
    logits_RV: Array, state: SamplingState, slot_R: Array, position_R: Array, shards: Shards
) -> Array:
    """Samples a kept token per row, with probability proportional to exp(logit / temperature)."""
    temperature_R = state.temperature_A[slot_R]
    weight_RV = _weights(logits_RV, jnp.where(temperature_R > 0.0, temperature_R, 1.0), shards)
    top_k_R = jnp.where(temperature_R > 0.0, state.top_k_A[slot_R], 0)
    top_p_R = jnp.where(temperature_R > 0.0, state.top_p_A[slot_R], 1.0)
    floor_R = top_k_threshold(weight_RV, top_k_R, shards)  # no pass over V if off
    floor_R = lax.cond(
        jnp.any(top_p_R < 1.0),
        lambda: top_p_threshold(weight_RV, top_p_R, floor_R, shards),
        lambda: floor_R,
    )
    floor_R = jnp.maximum(floor_R, state.min_p_A[slot_R])  # the largest weight is 1
    kept_RV = jnp.where(weight_RV >= floor_R[:, None], weight_RV, 0.0)
    return _race(kept_RV, state.seed_A2[slot_R], position_R, shards)


def _weights(logits_RV: Array, temperature_R: Array, shards: Shards) -> Array:
    """exp((logit - largest) / temperature), within [0, 1]; all 0 if every token is banned."""
    logits_RV = _clean(logits_RV)
    largest_R1 = shards.max(jnp.max(logits_RV, axis=-1, keepdims=True))
    largest_R1 = jnp.maximum(largest_R1, -_LARGEST)
    return row_major(jnp.exp((logits_RV - largest_R1) / temperature_R[:, None]))


def _race(weight_RV: Array, seed_R2: Array, position_R: Array, shards: Shards) -> Array:
    """Samples a block of 128 tokens, then a token of it, each in proportion to its weight.

    Each sampling is a race: the largest weight / exponential random number wins. Rounding changes
    the winner only if the first two are close. Inverting a cumulative sum would depend on the
    rounding of every term; programs of different sizes round differently, and must sample the same
    tokens.

    Two races take V / 128 and 128 exponentials; one race would take V. No block lies on two
    shards (`jinfer.parallel.model_shards`). A row without weight gives 0.

    Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", Information
      Processing Letters 97(5), 2006: the largest key u ** (1 / w), which is exp(-exponential / w).
    """
    spare = -weight_RV.shape[-1] % _LANES
    weight_RV = row_major(jnp.pad(weight_RV, ((0, 0), (0, spare))))
    part_RJ = lax.platform_dependent(weight_RV, tpu=_sum_tiles, default=_sum_blocks)
    num_blocks = part_RJ.shape[-1]
    sum_RJ = shards.join(part_RJ)
    lane_number_R128, block_number_RJ = _exponentials(seed_R2, position_R, sum_RJ.shape[-1])
    block_R = jnp.argmax(sum_RJ / block_number_RJ, axis=-1).astype(jnp.int32)
    local_R = shards.local(block_R, num_blocks)
    slice_of = partial(lax.dynamic_slice, slice_sizes=(_LANES,))
    lane_R128 = row_major(jax.vmap(slice_of)(weight_RV, (local_R * _LANES)[:, None]))
    lane_R128 = jnp.where((local_R < num_blocks)[:, None], lane_R128, 0.0)
    lane_R128 = shards.sum(lane_R128)  # all but one are zeros
    lane_R = jnp.argmax(lane_R128 / lane_number_R128, axis=-1).astype(jnp.int32)
    return block_R * _LANES + lane_R


def _exponentials(seed_R2: Array, position_R: Array, num_blocks: int) -> tuple[Array, Array]:
    """Exponential numbers of mean 1, for lanes [R, 128] and blocks [R, J], by seed and position.

    Each uses 32 random bits, with the finest resolution near 0, where unlikely tokens win. A
    block's number does not depend on the number of blocks, so a padded vocabulary keeps it.
    """
    bits = random_bits(fold_in(seed_R2, position_R), _LANES + num_blocks)
    # Keep off 0, since we divide by the result, and off 1, to which the largest would round.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    exponential = -jnp.log1p(-uniform)
    return exponential[:, :_LANES], exponential[:, _LANES:]


def _sum_blocks(weight_RV: Array) -> Array:
    """Sums of blocks of 128 tokens, [R, J]."""
    return jnp.sum(weight_RV.reshape(len(weight_RV), -1, _LANES), axis=-1)


def _sum_tiles(weight_RV: Array) -> Array:
    """The same over a TPU's tiles of 8 rows and 128 tokens, without moving any data."""
    num_rows = len(weight_RV)
    rows_of_tile = math.gcd(num_rows, 8)
    tiles = weight_RV.reshape(num_rows // rows_of_tile, rows_of_tile, -1, _LANES).swapaxes(1, 2)
    sums = jnp.sum(row_major(tiles), axis=-1)  # [R / 8, J, 8]
    return sums.swapaxes(1, 2).reshape(num_rows, -1)
