"""The values that cross between host and device: a batch down, its output up."""

from dataclasses import dataclass
from typing import no_type_check

import jax
from jaxtyping import Array, Bool, Int32

from jinfer.sampling.logprobs import Logprobs


@no_type_check  # also holds numpy arrays and shapes
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Everything the device needs for one step. Built on the host, padded to a bucket.

    Row b owns the packed tokens query_start_B[b] : query_start_B[b] + query_len_B[b]. Padding
    rows have query_len 0 and use the null slot, as do padding rows of logits and page writes.
    """

    token_T: Int32[Array, "T"]
    sampled_T: Bool[Array, "T"]  # the token is its slot's last sampled one; token_T is ignored
    slot_T: Int32[Array, "T"]
    position_T: Int32[Array, "T"]  # place in the token's own sequence

    slot_B: Int32[Array, "B"]
    query_start_B: Int32[Array, "B"]
    query_len_B: Int32[Array, "B"]
    kv_len_B: Int32[Array, "B"]  # tokens visible to the row, this step's included

    write_slot_J: Int32[Array, "J"]  # page-table entries to set before attending
    write_index_J: Int32[Array, "J"]
    write_page_J: Int32[Array, "J"]

    logits_index_R: Int32[Array, "R"]  # index into T of the token of each row of logits
    logits_slot_R: Int32[Array, "R"]
    samples_R: Bool[Array, "R"]  # sample the next token; else score given_token_R
    given_token_R: Int32[Array, "R"]  # the given next token, where none is sampled
    wants_logprobs_R: Bool[Array, "R"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The output of one step, an entry per row of logits."""

    token_R: Int32[Array, "R"]  # the sampled or the given token; NAN_TOKEN if the logits are NaN
    logprobs: Logprobs  # of token_R under the raw logits, for the rows that want them


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeBatch:
    """Everything the device needs for one or more decode steps of the same rows.

    Row b reads its newest token at position_B[b] and samples num_samples_B[b] tokens, one a step,
    or fewer if it samples a stop token or its logits are NaN. Padding rows use the null slot and
    sample none.
    """

    slot_B: Int32[Array, "B"]
    position_B: Int32[Array, "B"]  # of the first step's input token
    token_B: Int32[Array, "B"]  # that token
    sampled_B: Bool[Array, "B"]  # it is the slot's last sampled one; token_B is ignored
    num_samples_B: Int32[Array, "B"]
    wants_logprobs_B: Bool[Array, "B"]

    write_slot_J: Int32[Array, "J"]  # page-table entries to set before the first step
    write_index_J: Int32[Array, "J"]
    write_page_J: Int32[Array, "J"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeOutput:
    """The output of decode steps. Row b's tokens are in its first num_sampled_B[b] steps."""

    num_sampled_B: Int32[Array, "B"]
    token_IB: Int32[Array, "I B"]  # I = the most steps of a dispatch
    logprobs: Logprobs  # each leaf [I, B, ...]
