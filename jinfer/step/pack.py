"""Turns a plan into the StepBatch of its bucket: numpy arrays, padded on the bin slot."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jinfer.config import EnginePlan
from jinfer.schedule.plan import Chunk, StepPlan
from jinfer.step.batch import StepBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketShape:
    """The static sizes of one token bucket's program."""

    num_tokens: int  # T
    num_rows: int  # B, and R: there are never more readouts than rows or tokens
    num_page_writes: int  # J
    bin_slot: int

    @classmethod
    def of(cls, num_tokens: int, plan: EnginePlan) -> "BucketShape":
        num_rows = min(num_tokens, plan.max_slots)
        # A chunk of n tokens starts at most n / page_size pages, rounded up once per row.
        num_page_writes = num_rows + num_tokens // plan.page_size
        return cls(
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_page_writes=num_page_writes,
            bin_slot=plan.max_slots,
        )

    def empty(self) -> StepBatch:
        """A batch of padding only. Its numpy arrays may be filled in."""
        T, R, J = self.num_tokens, self.num_rows, self.num_page_writes

        def full(count: int, value: int = 0, dtype: type = np.int32) -> Any:
            return np.full(count, value, dtype)

        return StepBatch(
            token_T=full(T),
            drawn_T=full(T, dtype=np.bool_),
            slot_T=full(T, self.bin_slot),
            position_T=full(T),
            slot_B=full(R, self.bin_slot),
            query_start_B=full(R, T),
            query_len_B=full(R),
            kv_len_B=full(R),
            write_slot_J=full(J, self.bin_slot),
            write_index_J=full(J),
            write_page_J=full(J),
            read_token_R=full(R),
            read_slot_R=full(R, self.bin_slot),
            draws_R=full(R, dtype=np.bool_),
            target_R=full(R),
            wants_logprobs_R=full(R, dtype=np.bool_),
        )

    def shapes(self) -> StepBatch:
        """The batch's shapes and dtypes, to compile for."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.empty())


def pack(
    plan: StepPlan, shape: BucketShape, *, wants_logprobs: Callable[[Chunk], bool]
) -> StepBatch:
    """Lays the plan's chunks side by side in the order of the plan.

    A readout's place is its order too: chunk by chunk, position by position, so the host
    finds them again by walking the plan.
    """
    batch = shape.empty()
    token, readout = 0, 0
    for row, chunk in enumerate(plan.chunks):
        _pack_row(batch, row, token, chunk)
        start = readout
        readout = _pack_readouts(batch, readout, token, chunk)
        batch.wants_logprobs_R[start:readout] = wants_logprobs(chunk)
        token += chunk.num_tokens
    for place, write in enumerate(plan.page_writes):
        batch.write_slot_J[place] = write.slot
        batch.write_index_J[place] = write.index
        batch.write_page_J[place] = write.page_id
    return batch


def _pack_row(batch: StepBatch, row: int, token: int, chunk: Chunk) -> None:
    span = slice(token, token + chunk.num_tokens)
    sequence = chunk.sequence
    num_known = min(chunk.stop, sequence.num_tokens) - chunk.start
    batch.token_T[token : token + num_known] = sequence.tokens(chunk.start, chunk.start + num_known)
    # A token that is still on its way up is read on the device, from where it was drawn.
    batch.drawn_T[token + num_known : span.stop] = True
    batch.slot_T[span] = chunk.slot
    batch.position_T[span] = np.arange(chunk.start, chunk.stop)
    batch.slot_B[row] = chunk.slot
    batch.query_start_B[row] = token
    batch.query_len_B[row] = chunk.num_tokens
    batch.kv_len_B[row] = chunk.stop


def _pack_readouts(batch: StepBatch, readout: int, token: int, chunk: Chunk) -> int:
    for position in chunk.scored_positions:
        batch.read_token_R[readout] = token + position - chunk.start
        batch.read_slot_R[readout] = chunk.slot
        batch.target_R[readout] = chunk.sequence.prompt_ids[position + 1]
        readout += 1
    if chunk.samples:
        batch.read_token_R[readout] = token + chunk.num_tokens - 1
        batch.read_slot_R[readout] = chunk.slot
        batch.draws_R[readout] = True
        readout += 1
    return readout
