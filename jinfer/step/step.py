"""One jitted step: any mix of prefill chunks, decoding rows and rows to score."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jinfer.models.decoder import Decoder, Params
from jinfer.parallel.collectives import Shards
from jinfer.sampling.logprobs import read_logprobs
from jinfer.sampling.sampler import sample
from jinfer.step.batch import StepBatch, StepOutput
from jinfer.step.kv_cache import KVPages
from jinfer.step.slots import SlotState, record_sampled, write_pages

PagedAttention = Callable[..., tuple[Array, KVPages]]


def run_step(
    params: Params,
    pages: KVPages,
    slots: SlotState,
    batch: StepBatch,
    *,
    decoder: Decoder,
    paged_attention: PagedAttention,
    max_logprobs: int,
    precision: str,
) -> tuple[KVPages, SlotState, StepOutput]:
    """Computes the batch's tokens, samples or scores a token per row of logits, updates the slots.

    Donates: `pages` and `slots`; the caller must replace its own references.
    Recompiles: once per token bucket; nothing else may vary between steps.
    """
    slots = write_pages(slots, batch)
    batch = _without_stopped(batch, slots)
    token_T = jnp.where(batch.sampled_T, slots.last_token_A[batch.slot_T], batch.token_T)
    attend = _attend(batch, slots, decoder, paged_attention)
    with jax.default_matmul_precision(precision):
        hidden_TD, pages = decoder.hidden(params, token_T, batch.position_T, attend, pages)
        logits_RV = decoder.logits(params, hidden_TD[batch.logits_index_R])
    slots, output = _read(logits_RV, slots, batch, max_logprobs, decoder.shards)
    return pages, slots, output


def _without_stopped(batch: StepBatch, slots: SlotState) -> StepBatch:
    """Empties rows whose slot stopped in a dispatch that the host had not read when it sent this.

    Their K/V may have gaps by now, and nobody reads the tokens they would sample.
    """
    stopped_B = slots.stopped_A[batch.slot_B]
    return dataclasses.replace(
        batch,
        query_len_B=jnp.where(stopped_B, 0, batch.query_len_B),
        samples_R=batch.samples_R & ~slots.stopped_A[batch.logits_slot_R],
    )


def _attend(
    batch: StepBatch, slots: SlotState, decoder: Decoder, paged_attention: PagedAttention
) -> Callable[..., tuple[Array, KVPages]]:
    scale = decoder.config.head_dim**-0.5
    page_table_BM = slots.page_table_AM[batch.slot_B]

    def attend(
        q_TNH: Array, k_TKH: Array, v_TKH: Array, pages: KVPages, layer: Any
    ) -> tuple[Array, KVPages]:
        with jax.named_scope("paged_attention"):
            return paged_attention(
                q_TNH,
                k_TKH,
                v_TKH,
                pages,
                layer,
                page_table_BM,
                batch.kv_len_B,
                batch.query_start_B,
                batch.query_len_B,
                scale=scale,
            )

    return attend


def _read(
    logits_RV: Array, slots: SlotState, batch: StepBatch, max_logprobs: int, shards: Shards
) -> tuple[SlotState, StepOutput]:
    # Of the step, the random key depends only on the position of the new token: a request
    # samples the same tokens alone or in a batch.
    position_R = batch.position_T[batch.logits_index_R] + 1
    with jax.named_scope("sample"):
        sampled_R = sample(logits_RV, slots.sampling, batch.logits_slot_R, position_R, shards)
        token_R = jnp.where(batch.samples_R, sampled_R, batch.given_token_R)
    slots = record_sampled(slots, batch.logits_slot_R, token_R, batch.samples_R, shards)
    wants_R = batch.wants_logprobs_R
    with jax.named_scope("logprobs"):
        logprobs = read_logprobs(
            logits_RV, token_R, wants_R, max_logprobs, wants_token_R=wants_R, shards=shards
        )
    return slots, StepOutput(token_R=token_R, logprobs=logprobs)
