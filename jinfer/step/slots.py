"""SlotState: everything a running sequence needs on the device, one row per slot.

A sequence is admitted by writing its slot's row, without a new shape. The row after the last
slot is the null slot: padding writes there, so it never changes a running sequence.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from jinfer.parallel.collectives import WHOLE, Shards
from jinfer.sampling.sampler import NAN_TOKEN, SamplingState, empty_state, record
from jinfer.step.batch import StepBatch

ADMISSION_ROWS = 8  # slots written by one dispatch of `write_slots`
RESTORED_TOKENS = 1024  # output tokens counted by one dispatch of `restore_counts`


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotState:
    """Per-slot state, first axis A = slots + the null slot. Donated to every jitted function."""

    last_token_A: Int32[Array, "A"]  # sampled last; the next step's input
    stopped_A: Bool[Array, "A"]  # sampled a stop token, or NaN: steps sample no more for the slot
    page_table_AM: Int32[Array, "A M"]  # entries past a sequence's length are stale but valid
    sampling: SamplingState


def empty_slots(*, max_slots: int, pages_per_slot: int, vocab_size: int) -> SlotState:
    """State of an engine in which nothing runs yet; every page-table entry is the null page."""
    num_rows = max_slots + 1
    return SlotState(
        last_token_A=jnp.zeros(num_rows, jnp.int32),
        stopped_A=jnp.zeros(num_rows, bool),
        page_table_AM=jnp.zeros((num_rows, pages_per_slot), jnp.int32),
        sampling=empty_state(num_rows, vocab_size),
    )


def write_pages(slots: SlotState, batch: StepBatch) -> SlotState:
    """Writes the step's new pages to the page table; padding goes to the null slot's row."""
    page_table_AM = slots.page_table_AM.at[batch.write_slot_J, batch.write_index_J].set(
        batch.write_page_J
    )
    return dataclasses.replace(slots, page_table_AM=page_table_AM)


def record_sampled(
    slots: SlotState,
    slot_R: Int32[Array, "R"],
    token_R: Int32[Array, "R"],
    samples_R: Bool[Array, "R"],
    shards: Shards = WHOLE,
) -> SlotState:
    """Stores the sampled tokens as next inputs and for penalties, and marks stopped slots.

    A slot whose logits are NaN stops too; token 0 stands for the one that it did not sample.
    """
    null_slot = slots.last_token_A.shape[0] - 1
    sampled_slot_R = jnp.where(samples_R, slot_R, null_slot)
    stops_R = jnp.any(slots.sampling.stop_ids_AJ[sampled_slot_R] == token_R[:, None], axis=-1)
    stops_R = stops_R | (token_R == NAN_TOKEN)
    token_R = jnp.maximum(token_R, 0)
    return dataclasses.replace(
        slots,
        last_token_A=slots.last_token_A.at[sampled_slot_R].set(token_R),
        stopped_A=slots.stopped_A.at[sampled_slot_R].set(stops_R),
        sampling=record(slots.sampling, slot_R, token_R, samples_R, shards),
    )


def write_slots(
    slots: SlotState,
    slot_A: Int32[Array, "A"],
    rows: SamplingState,
    page_table_AM: Int32[Array, "A M"],
) -> SlotState:
    """Admits up to ADMISSION_ROWS sequences: writes their parameters, zeroes their output counts.

    Args:
      slots: the state; donated.
      slot_A: the slot of each row; the null slot for padding.
      rows: one row per slot; `output_count_AV` is None, to avoid sending zeros.
      page_table_AM: the pages that each sequence starts with, from the prefix cache or new.
    """
    num_rows, vocab_size = slot_A.shape[0], slots.sampling.output_count_AV.shape[-1]
    counts_AV = jnp.zeros((num_rows, vocab_size), jnp.int32)
    rows = dataclasses.replace(rows, output_count_AV=counts_AV)
    sampling = jax.tree.map(lambda all_, new: all_.at[slot_A].set(new), slots.sampling, rows)
    stopped_A = slots.stopped_A.at[slot_A].set(False)
    page_table_AM = slots.page_table_AM.at[slot_A].set(page_table_AM)
    return dataclasses.replace(
        slots, page_table_AM=page_table_AM, stopped_A=stopped_A, sampling=sampling
    )


def restore_counts(
    slots: SlotState,
    slot: Int32[Array, ""],
    token_J: Int32[Array, "J"],
    *,
    shards: Shards = WHOLE,
) -> SlotState:
    """Adds output tokens to a slot's counts, for a sequence that resumes; padding is V."""
    sampling = slots.sampling
    local_J = shards.local(token_J, sampling.output_count_AV.shape[-1])
    counts_AV = sampling.output_count_AV.at[slot, local_J].add(1, mode="drop")
    return dataclasses.replace(
        slots, sampling=dataclasses.replace(sampling, output_count_AV=counts_AV)
    )


def admission_rows(rows: Sequence[SamplingState], vocab_size: int) -> SamplingState:
    """Stacks single rows (leaves without the slot axis) and pads them to ADMISSION_ROWS."""
    stacked = dataclasses.replace(
        empty_state(ADMISSION_ROWS, vocab_size, xp=np), output_count_AV=None
    )
    for place, row in enumerate(rows):
        for field in dataclasses.fields(row):
            column = getattr(stacked, field.name)
            if column is not None:
                column[place] = getattr(row, field.name)
    return stacked
