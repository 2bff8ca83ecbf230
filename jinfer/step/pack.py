"""Turns a plan into the StepBatch of its bucket: numpy arrays, padded on the bin slot."""

from collections.abc import Callable
from dataclasses import dataclass

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

        def zeros(count: int) -> np.ndarray:
            return np.zeros(count, np.int32)

        def bins(count: int) -> np.ndarray:
            return np.full(count, self.bin_slot, np.int32)

        return StepBatch(
            token_T=zeros(T),
            drawn_T=np.zeros(T, np.bool_),
            slot_T=bins(T),
            position_T=zeros(T),
            slot_B=bins(R),
            query_start_B=np.full(R, T, np.int32),
            query_len_B=zeros(R),
            kv_len_B=zeros(R),
            write_slot_J=bins(J),
            write_index_J=zeros(J),
            write_page_J=zeros(J),
            read_token_R=zeros(R),
            read_slot_R=bins(R),
            draws_R=np.zeros(R, np.bool_),
            target_R=zeros(R),
            wants_logprobs_R=np.zeros(R, np.bool_),
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
