"""Runs one or many decode steps in one dispatch, without the host in between."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from jinfer.models.decoder import Decoder, Params
from jinfer.sampling.logprobs import no_logprobs
from jinfer.step.batch import DecodeBatch, DecodeOutput, StepBatch, StepOutput
from jinfer.step.kv_cache import KVPages
from jinfer.step.slots import SlotState
from jinfer.step.step import PagedAttention, run_step


def run_decode(
    params: Params,
    pages: KVPages,
    slots: SlotState,
    batch: DecodeBatch,
    *,
    decoder: Decoder,
    paged_attention: PagedAttention,
    max_logprobs: int,
    precision: str,
    max_steps: int,
) -> tuple[KVPages, SlotState, DecodeOutput]:
    """Steps until every row has sampled all its tokens or a stop token, or its logits are NaN.

    A row that is done becomes an empty row: attention skips it and nothing is written for it,
    while the others continue. A slot that stopped in an earlier dispatch samples nothing, so the
    host may send the next batch before it has read this one.

    Args:
      params: the decoder's parameters.
      pages: the KV pool; the batch's page writes cover every token it may write.
      slots: the state of every slot.
      batch: the rows, and how many tokens each may sample, at most `max_steps`.
      decoder: the model.
      paged_attention: an implementation of the contract.
      max_logprobs: J of the top-logprob lists.
      precision: of matrix products, as `jax.default_matmul_precision` names it.
      max_steps: I, the most steps that the output holds.

    Donates: `pages` and `slots`; the caller must replace its own references.
    Recompiles: once per row bucket; the number of steps is data.
    """
    step = partial(
        run_step,
        decoder=decoder,
        # Each row has one token, so compile no pass over wider tiles.
        paged_attention=partial(paged_attention, tile_tokens=1),
        max_logprobs=max_logprobs,
        precision=precision,
    )
    slots = _enter(slots, batch)
    num_rows = batch.slot_B.shape[0]
    room = StepOutput(  # of I steps
        token_R=jnp.zeros((max_steps, num_rows), jnp.int32),
        logprobs=no_logprobs(max_steps, num_rows, max_logprobs=max_logprobs),
    )

    def samples_at(i: Int32[Array, ""], slots: SlotState) -> Bool[Array, "B"]:
        return (i < batch.num_samples_B) & ~slots.stopped_A[batch.slot_B]

    def goes_on(carry: Any) -> Bool[Array, ""]:
        i, _, slots, _, _ = carry
        return (i < max_steps) & jnp.any(samples_at(i, slots))

    def one_step(carry: Any) -> Any:
        i, pages, slots, num_sampled_B, room = carry
        sampling_B = samples_at(i, slots)
        pages, slots, output = step(params, pages, slots, _step_batch(batch, slots, i, sampling_B))
        room = jax.tree.map(lambda all_, new: all_.at[i].set(new), room, output)
        return i + 1, pages, slots, num_sampled_B + sampling_B, room

    start = (jnp.int32(0), pages, slots, jnp.zeros(num_rows, jnp.int32), room)
    _, pages, slots, num_sampled_B, room = lax.while_loop(goes_on, one_step, start)
    return pages, slots, _output(num_sampled_B, room)


def _enter(slots: SlotState, batch: DecodeBatch) -> SlotState:
    """Writes the new page-table entries, and the first step's tokens if the host knows them."""
    page_table_AM = slots.page_table_AM.at[batch.write_slot_J, batch.write_index_J].set(
        batch.write_page_J
    )
    token_B = jnp.where(batch.sampled_B, slots.last_token_A[batch.slot_B], batch.token_B)
    last_token_A = slots.last_token_A.at[batch.slot_B].set(token_B)
    return dataclasses.replace(slots, page_table_AM=page_table_AM, last_token_A=last_token_A)


def _step_batch(
    batch: DecodeBatch, slots: SlotState, i: Int32[Array, ""] | int, samples_B: Bool[Array, "B"]
) -> StepBatch:
    """The batch of step i: one token for each row that samples; the other rows are empty."""
    num_rows = batch.slot_B.shape[0]
    row_B = jnp.arange(num_rows, dtype=jnp.int32)
    null_slot = slots.last_token_A.shape[0] - 1
    slot_B = jnp.where(samples_B, batch.slot_B, null_slot)
    position_B = jnp.where(samples_B, batch.position_B + i, 0)
    no_write_J = jnp.zeros(0, jnp.int32)
    return StepBatch(
        token_T=jnp.zeros(num_rows, jnp.int32),
        sampled_T=jnp.ones(num_rows, bool),
        slot_T=slot_B,
        position_T=position_B,
        slot_B=slot_B,
        query_start_B=row_B,
        query_len_B=samples_B.astype(jnp.int32),
        kv_len_B=jnp.where(samples_B, position_B + 1, 0),
        write_slot_J=no_write_J,
        write_index_J=no_write_J,
        write_page_J=no_write_J,
        logits_index_R=row_B,
        logits_slot_R=slot_B,
        samples_R=samples_B,
        given_token_R=jnp.zeros(num_rows, jnp.int32),
        wants_logprobs_R=batch.wants_logprobs_B & samples_B,
    )


def _output(num_sampled_B: Int32[Array, "B"], room: StepOutput) -> DecodeOutput:
    return DecodeOutput(num_sampled_B=num_sampled_B, token_IB=room.token_R, logprobs=room.logprobs)
