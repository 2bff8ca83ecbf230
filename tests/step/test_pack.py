"""Packing a plan loses nothing, and nothing overruns its bucket."""

import random

import jax
import numpy as np
import pytest

from jinfer.config import EnginePlan
from jinfer.schedule.capacity import bucket_for, token_buckets
from jinfer.schedule.plan import Chunk, StepPlan
from jinfer.schedule.scheduler import Scheduler
from jinfer.schedule.sequence import TokenSequence
from jinfer.step.batch import StepBatch
from jinfer.step.pack import BucketShape, pack

DRAWN = 100_000  # tokens drawn by the pretended device: DRAWN + position


def shape_of(num_tokens: int, max_slots: int, page_size: int) -> BucketShape:
    plan = EnginePlan(
        platform="cpu",
        dtype="float32",
        kv_dtype="float32",
        kv_head_dim=1,
        tensor_parallel_size=1,
        vocab_size=8,
        max_model_len=50,
        max_slots=max_slots,
        max_step_tokens=num_tokens,
        max_chunk_tokens=num_tokens,
        page_size=page_size,
        num_pages=100,
        page_bytes=1,
        num_host_pages=0,
        pages_per_slot=50,
        token_buckets=(num_tokens,),
        step_cost_tokens=0,
        decode_buckets=(),
        max_decode_steps=1,
        max_logprobs=1,
        layer_loop="scan",
        weight_layout="default",
        attention="xla",
        quick_compile=False,
    )
    return BucketShape.of(num_tokens, plan)


def random_sequence(rng: random.Random, number: int, max_model_len: int) -> TokenSequence:
    prompt_ids = [rng.randrange(1, 1000) for _ in range(rng.randint(1, max_model_len - 2))]
    return TokenSequence(
        request_id=str(number),
        index=0,
        prompt_ids=prompt_ids,
        max_length=rng.randint(len(prompt_ids) + 1, max_model_len),
        scores_prompt=rng.random() < 0.3,
    )


@pytest.mark.parametrize("seed", range(14))
def test_random_plans_are_packed_exactly(seed: int) -> None:
    rng = random.Random(seed)
    max_slots, page_size = rng.choice([1, 3, 8]), rng.choice([1, 2, 4, 16])
    max_step_tokens, max_model_len = max_slots + rng.choice([0, 5, 40]), rng.choice([8, 50])
    num_pages = 1 + -(-max_model_len // page_size) * rng.choice([1, 2, 6])
    scheduler = Scheduler(
        max_slots=max_slots,
        max_step_tokens=max_step_tokens,
        page_size=page_size,
        num_pages=num_pages,
        max_model_len=max_model_len,
        max_chunk_tokens=rng.choice([None, 3]),
    )
    buckets = token_buckets(max_step_tokens, max_slots)
    table: dict[tuple[int, int], int] = {}  # (slot, index) -> page, as the device sees it
    unread: list[StepPlan] = []
    for number in range(12):
        scheduler.add(random_sequence(rng, number, max_model_len))
    num_plans = 0
    while scheduler.has_work or unread:
        plan = scheduler.plan()
        if plan is not None:
            num_plans += 1
            size = bucket_for(buckets, plan.num_tokens)
            shape = shape_of(size, max_slots, page_size)
            batch = pack(plan, shape, wants_logprobs=lambda chunk: chunk.num_logits_rows > 1)
            check(batch, plan, shape, table, page_size)
            unread.append(plan)
        if unread and (plan is None or len(unread) > 1):  # one step ahead, as the engine
            commit(scheduler, unread.pop(0))
    assert num_plans >= 3


def commit(scheduler: Scheduler, plan: StepPlan) -> None:
    for chunk in plan.chunks:
        scheduler.commit(chunk, DRAWN + chunk.stop if chunk.samples else None)
        sequence = chunk.sequence
        if chunk.samples and sequence.num_tokens >= sequence.max_length:
            scheduler.finish(sequence)


def check(
    batch: StepBatch,
    plan: StepPlan,
    shape: BucketShape,
    table: dict[tuple[int, int], int],
    page_size: int,
) -> None:
    """Reads the plan back out of the arrays, row by row."""
    for packed, declared in zip(
        jax.tree.leaves(batch), jax.tree.leaves(shape.shapes()), strict=True
    ):
        assert (packed.shape, packed.dtype) == (declared.shape, declared.dtype)
    assert len(plan.page_writes) <= shape.num_page_writes
    for place, write in enumerate(plan.page_writes):
        table[write.slot, write.index] = int(batch.write_page_J[place])
        assert batch.write_slot_J[place] == write.slot and batch.write_index_J[place] == write.index
    token, logits_row = 0, 0
    for row, chunk in enumerate(plan.chunks):
        span = slice(token, token + chunk.num_tokens)
        assert batch.slot_B[row] == chunk.slot
        assert (batch.query_start_B[row], batch.query_len_B[row]) == (token, chunk.num_tokens)
        assert batch.kv_len_B[row] == chunk.start + chunk.num_tokens
        np.testing.assert_array_equal(batch.slot_T[span], chunk.slot)
        np.testing.assert_array_equal(batch.position_T[span], range(chunk.start, chunk.stop))
        for place, position in zip(
            range(token, span.stop), range(chunk.start, chunk.stop), strict=True
        ):
            check_token(batch, place, chunk, position)
            assert table[chunk.slot, position // page_size] != 0
            assert (
                table[chunk.slot, position // page_size]
                == (chunk.sequence.pages[position // page_size])
            )
        logits_row = check_logits_rows(batch, logits_row, token, chunk)
        token = span.stop
    check_padding(batch, shape, len(plan.chunks), token, logits_row, len(plan.page_writes))


def check_token(batch: StepBatch, place: int, chunk: Chunk, position: int) -> None:
    """The token's value, or the mark that its value is on its way from the device."""
    sequence = chunk.sequence
    if position < sequence.num_prompt_tokens:
        assert not batch.sampled_T[place] and batch.token_T[place] == sequence.prompt_ids[position]
    elif position < sequence.num_tokens:
        assert not batch.sampled_T[place] and batch.token_T[place] == DRAWN + position
    else:
        # The device keeps one token per slot, so only the last one drawn before may be unread.
        assert batch.sampled_T[place] and position == sequence.num_tokens == chunk.stop - 1
        assert sequence.num_unread - chunk.samples == 1


def check_logits_rows(batch: StepBatch, logits_row: int, token: int, chunk: Chunk) -> int:
    ends = [chunk.stop - 1] if chunk.samples else []
    for position in [*chunk.scored_positions, *ends]:
        assert batch.logits_index_R[logits_row] == token + position - chunk.start
        assert batch.logits_slot_R[logits_row] == chunk.slot
        draws = chunk.samples and position == chunk.stop - 1
        assert batch.samples_R[logits_row] == draws
        assert batch.wants_logprobs_R[logits_row] == (chunk.num_logits_rows > 1)
        if not draws:
            assert batch.given_token_R[logits_row] == chunk.sequence.prompt_ids[position + 1]
        logits_row += 1
    return logits_row


def check_padding(
    batch: StepBatch,
    shape: BucketShape,
    num_rows: int,
    token: int,
    logits_row: int,
    num_writes: int,
) -> None:
    """What is left of every array stands on the bin and asks for nothing."""
    assert num_rows <= shape.num_rows and logits_row <= shape.num_rows and token <= shape.num_tokens
    assert (batch.slot_T[token:] == shape.null_slot).all() and not batch.sampled_T[token:].any()
    assert (batch.slot_B[num_rows:] == shape.null_slot).all()
    assert not batch.query_len_B[num_rows:].any() and not batch.kv_len_B[num_rows:].any()
    assert (batch.query_start_B[num_rows:] == shape.num_tokens).all()
    assert (batch.logits_slot_R[logits_row:] == shape.null_slot).all()
    assert not batch.samples_R[logits_row:].any() and not batch.wants_logprobs_R[logits_row:].any()
    assert (batch.write_slot_J[num_writes:] == shape.null_slot).all()
    assert not batch.write_page_J[num_writes:].any()


def test_a_bucket_holds_the_most_page_writes_there_can_be() -> None:
    # Three rows of 5, 5 and 6 tokens, pages of 4, each beginning a page: 2 + 2 + 2.
    scheduler = Scheduler(
        max_slots=3, max_step_tokens=16, page_size=4, num_pages=40, max_model_len=40
    )
    for number, length in enumerate([5, 5, 20]):
        scheduler.add(
            TokenSequence(request_id=str(number), index=0, prompt_ids=[7] * length, max_length=40)
        )
    plan = scheduler.plan()
    assert plan is not None and plan.num_tokens == 16
    assert len(plan.page_writes) == 6 <= shape_of(16, 3, 4).num_page_writes == 7
