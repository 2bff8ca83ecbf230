"""Packs a plan into the batch of its bucket: numpy arrays, padded with the null slot."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jinfer.config import EnginePlan
from jinfer.schedule.plan import Chunk, StepPlan
from jinfer.step.batch import DecodeBatch, StepBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketShape:
    """The static sizes of one token bucket's program."""

    num_tokens: int  # T
    num_rows: int  # B, and R: rows of logits never exceed the slots or the tokens
    num_page_writes: int  # J
    null_slot: int

    @classmethod
    def of(cls, num_tokens: int, plan: EnginePlan) -> "BucketShape":
        num_rows = min(num_tokens, plan.max_slots)
        # A chunk of n tokens starts at most n / page_size pages, rounded up in each row.
        num_page_writes = num_rows + num_tokens // plan.page_size
        return cls(
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_page_writes=num_page_writes,
            null_slot=plan.max_slots,
        )

    def empty(self) -> StepBatch:
        """A batch of padding only. Its numpy arrays may be filled in."""
        T, R, J = self.num_tokens, self.num_rows, self.num_page_writes

        def full(count: int, value: int = 0, dtype: type = np.int32) -> Any:
            return np.full(count, value, dtype)

        return StepBatch(
            token_T=full(T),
            sampled_T=full(T, dtype=np.bool_),
            slot_T=full(T, self.null_slot),
            position_T=full(T),
            slot_B=full(R, self.null_slot),
            query_start_B=full(R, T),
            query_len_B=full(R),
            kv_len_B=full(R),
            write_slot_J=full(J, self.null_slot),
            write_index_J=full(J),
            write_page_J=full(J),
            logits_index_R=full(R),
            logits_slot_R=full(R, self.null_slot),
            samples_R=full(R, dtype=np.bool_),
            given_token_R=full(R),
            wants_logprobs_R=full(R, dtype=np.bool_),
        )

    def shapes(self) -> StepBatch:
        """The batch's shapes and dtypes, to compile for."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.empty())


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeShape:
    """The static sizes of one row bucket's decode program."""

    num_rows: int  # B
    num_page_writes: int  # J
    null_slot: int

    @classmethod
    def of(cls, num_rows: int, plan: EnginePlan) -> "DecodeShape":
        # n tokens start at most n / page_size pages, rounded up, also from within a page.
        pages_per_row = -(-plan.max_decode_steps // plan.page_size)
        return cls(
            num_rows=num_rows,
            num_page_writes=num_rows * pages_per_row,
            null_slot=plan.max_slots,
        )

    def empty(self) -> DecodeBatch:
        """A batch of padding only. Its numpy arrays may be filled in."""
        B, J = self.num_rows, self.num_page_writes

        def full(count: int, value: int = 0, dtype: type = np.int32) -> Any:
            return np.full(count, value, dtype)

        return DecodeBatch(
            slot_B=full(B, self.null_slot),
            position_B=full(B),
            token_B=full(B),
            sampled_B=full(B, dtype=np.bool_),
            num_samples_B=full(B),
            wants_logprobs_B=full(B, dtype=np.bool_),
            write_slot_J=full(J, self.null_slot),
            write_index_J=full(J),
            write_page_J=full(J),
        )

    def shapes(self) -> DecodeBatch:
        """The batch's shapes and dtypes, to compile for."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.empty())


def pack_decode(
    plan: StepPlan, shape: DecodeShape, *, wants_logprobs: Callable[[Chunk], bool]
) -> DecodeBatch:
    """Packs a plan that only decodes: one row per chunk, in the order of the plan."""
    batch = shape.empty()
    for row, chunk in enumerate(plan.chunks):
        batch.slot_B[row] = chunk.slot
        batch.position_B[row] = chunk.start
        known = chunk.start < chunk.sequence.num_tokens
        batch.sampled_B[row] = not known
        if known:
            batch.token_B[row] = chunk.sequence.token_at(chunk.start)
        batch.num_samples_B[row] = chunk.num_steps
        batch.wants_logprobs_B[row] = wants_logprobs(chunk)
    _pack_page_writes(batch, plan)
    return batch


def pack(
    plan: StepPlan, shape: BucketShape, *, wants_logprobs: Callable[[Chunk], bool]
) -> StepBatch:
    """Packs the plan's chunks one after the other, in the order of the plan.

    Rows of logits have the same order: by chunk, then by position. So the host finds each row by
    walking the plan.
    """
    batch = shape.empty()
    token, logits_row = 0, 0
    for row, chunk in enumerate(plan.chunks):
        _pack_row(batch, row, token, chunk)
        start = logits_row
        logits_row = _pack_logits_rows(batch, logits_row, token, chunk)
        batch.wants_logprobs_R[start:logits_row] = wants_logprobs(chunk)
        token += chunk.num_tokens
    _pack_page_writes(batch, plan)
    return batch


def _pack_page_writes(batch: StepBatch | DecodeBatch, plan: StepPlan) -> None:
    for place, write in enumerate(plan.page_writes):
        batch.write_slot_J[place] = write.slot
        batch.write_index_J[place] = write.index
        batch.write_page_J[place] = write.page_id


def _pack_row(batch: StepBatch, row: int, token: int, chunk: Chunk) -> None:
    span = slice(token, token + chunk.num_tokens)
    sequence = chunk.sequence
    num_known = max(0, min(chunk.stop, sequence.num_tokens) - chunk.start)
    if num_known:
        known = sequence.tokens(chunk.start, chunk.start + num_known)
        batch.token_T[token : token + num_known] = known
    # The device reads tokens that the host does not know yet from SlotState.
    batch.sampled_T[token + num_known : span.stop] = True
    batch.slot_T[span] = chunk.slot
    batch.position_T[span] = np.arange(chunk.start, chunk.stop)
    batch.slot_B[row] = chunk.slot
    batch.query_start_B[row] = token
    batch.query_len_B[row] = chunk.num_tokens
    batch.kv_len_B[row] = chunk.stop


def _pack_logits_rows(batch: StepBatch, logits_row: int, token: int, chunk: Chunk) -> int:
    for position in chunk.scored_positions:
        batch.logits_index_R[logits_row] = token + position - chunk.start
        batch.logits_slot_R[logits_row] = chunk.slot
        batch.given_token_R[logits_row] = chunk.sequence.prompt_ids[position + 1]
        logits_row += 1
    if chunk.samples:
        batch.logits_index_R[logits_row] = token + chunk.num_tokens - 1
        batch.logits_slot_R[logits_row] = chunk.slot
        batch.samples_R[logits_row] = True
        logits_row += 1
    return logits_row
