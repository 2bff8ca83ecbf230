"""A slot's row is written whole, and padding reaches nothing but the bin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.errors import RequestError
from jinfer.request.params import SamplingParams
from jinfer.sampling.admission import check_row, sampling_row
from jinfer.sampling.sampler import SamplingState
from jinfer.schedule.sequence import TokenSequence
from jinfer.step.pack import BucketShape
from jinfer.step.slots import (
    ADMISSION_ROWS,
    RESTORED_TOKENS,
    SlotState,
    admission_rows,
    empty_slots,
    record_sampled,
    restore_counts,
    write_pages,
    write_slots,
)

VOCAB_SIZE, MAX_SLOTS, BIN = 70, 4, 4
SHAPE = BucketShape(num_tokens=4, num_rows=4, num_page_writes=5, null_slot=BIN)

NO_PAGES = jnp.zeros((ADMISSION_ROWS, 3), jnp.int32)


@pytest.fixture
def slots() -> SlotState:
    return empty_slots(max_slots=MAX_SLOTS, pages_per_slot=3, vocab_size=VOCAB_SIZE)


def row_of(params: SamplingParams, prompt_ids: list[int], output_ids: list[int]) -> SamplingState:
    sequence = TokenSequence(request_id="r", index=0, prompt_ids=prompt_ids, max_length=50)
    sequence.output_ids = output_ids
    return sampling_row(params, sequence, seed=9, stop_ids=[2], bad_words=[], vocab_size=VOCAB_SIZE)


def same(one: SlotState, other: SlotState, slot: int) -> bool:
    """Whether a slot's row is the same in both, leaf by leaf."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a[slot], b[slot]) for a, b in leaves)


def test_admission_writes_its_slot_and_no_other(slots: SlotState) -> None:
    params = SamplingParams(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, presence_penalty=0.3, min_tokens=2,
        frequency_penalty=0.2, repetition_penalty=1.5, logit_bias={4: 2.5},
        allowed_token_ids=[4, 5],
    )  # fmt: skip
    rows = admission_rows([row_of(params, [5, 6, 6], [8])], VOCAB_SIZE)
    slot_A = jnp.full(ADMISSION_ROWS, BIN, jnp.int32).at[0].set(2)
    before = jax.tree.map(jnp.copy, slots)
    pages_A3 = jnp.zeros((ADMISSION_ROWS, 3), jnp.int32).at[0].set(jnp.array([4, 9, 0]))
    after = write_slots(slots, slot_A, rows, pages_A3)
    assert after.page_table_AM[2].tolist() == [4, 9, 0]
    assert all(same(before, after, slot) for slot in (0, 1, 3))
    state = after.sampling
    read = {
        name: float(getattr(state, name)[2])
        for name in ("temperature_A", "top_k_A", "top_p_A", "min_p_A", "presence_penalty_A")
    }
    assert list(read.values()) == pytest.approx([0.5, 7, 0.9, 0.1, 0.3])
    assert state.min_length_A[2] == 5 and state.stop_ids_AJ[2, 0] == 2
    assert state.bias_ids_AJ[2, 0] == 4 and state.bias_values_AJ[2, 0] == 2.5
    assert state.allowed_bits_AW[2].tolist() == [0b110000, 0, 0]
    assert state.prompt_bits_AW[2].tolist() == [0b1100000, 0, 0]
    assert state.recent_A7[2].tolist() == [VOCAB_SIZE] * 6 + [8]
    assert not state.output_count_AV[2].any()


def test_a_slot_taken_again_forgets_who_was_there(slots: SlotState) -> None:
    everything = row_of(
        SamplingParams(temperature=2.0, logit_bias={1: 1.0}, top_k=3, min_tokens=4), [1, 2], [3, 4]
    )
    nothing = row_of(SamplingParams(temperature=0.0), [7], [])
    slot_A = jnp.full(ADMISSION_ROWS, BIN, jnp.int32).at[0].set(1)
    fresh = write_slots(slots, slot_A, admission_rows([nothing], VOCAB_SIZE), NO_PAGES)
    used = write_slots(slots, slot_A, admission_rows([everything], VOCAB_SIZE), NO_PAGES)
    used = record_sampled(used, jnp.array([1]), jnp.array([9]), jnp.array([True]))
    again = write_slots(used, slot_A, admission_rows([nothing], VOCAB_SIZE), NO_PAGES)
    again = dataclasses.replace(again, last_token_A=fresh.last_token_A)  # stale, and not read
    assert same(again, fresh, 1)


def test_restored_counts_are_those_of_the_output(slots: SlotState) -> None:
    token_J = np.full(RESTORED_TOKENS, VOCAB_SIZE, np.int32)
    token_J[:5] = [3, 3, 0, 69, 3]
    restored = restore_counts(slots, jnp.int32(1), jnp.asarray(token_J))
    counts_V = restored.sampling.output_count_AV[1]
    assert (counts_V[3], counts_V[0], counts_V[69], counts_V.sum()) == (3, 1, 1, 5)
    assert not np.asarray(restored.sampling.output_count_AV)[[0, 2, 3, 4]].any()


def test_only_rows_that_draw_are_recorded(slots: SlotState) -> None:
    samples_R = jnp.array([True, False, True])
    after = record_sampled(slots, jnp.array([0, 1, 3]), jnp.array([11, 12, 13]), samples_R)
    assert after.last_token_A.tolist()[:4] == [11, 0, 0, 13]
    counts_AV = after.sampling.output_count_AV
    assert counts_AV[0, 11] == counts_AV[3, 13] == 1 and not counts_AV[1].any()


def test_a_slot_whose_logits_are_nan_stops(slots: SlotState) -> None:
    samples_R, token_R = jnp.array([True, True, False]), jnp.array([-1, 5, -1])
    after = record_sampled(slots, jnp.array([0, 1, 2]), token_R, samples_R)
    assert after.stopped_A.tolist()[:4] == [True, False, False, False]
    assert after.last_token_A.tolist()[:3] == [0, 5, 0]
    assert not after.sampling.output_count_AV[:, -1].any()


def test_padding_writes_no_page(slots: SlotState) -> None:
    batch = SHAPE.empty()
    batch.write_slot_J[:2], batch.write_index_J[:2], batch.write_page_J[:2] = 1, [0, 2], [8, 9]
    after = write_pages(slots, jax.tree.map(jnp.asarray, batch))
    assert after.page_table_AM.tolist() == [[0] * 3, [8, 0, 9], [0] * 3, [0] * 3, [0] * 3]


def test_rows_that_do_not_fit_are_refused() -> None:
    few = SamplingParams(allowed_token_ids=[2], min_tokens=1)
    with pytest.raises(
        RequestError, match=r"allowed_token_ids=\[2\], min_tokens=1, and stop tokens"
    ):
        check_row(few, [2], [], VOCAB_SIZE)
    check_row(SamplingParams(allowed_token_ids=[2, 3], min_tokens=1), [2], [], VOCAB_SIZE)
    with pytest.raises(RequestError, match="ends no bad word"):
        check_row(SamplingParams(allowed_token_ids=[5]), [], [(5,)], VOCAB_SIZE)
    with pytest.raises(RequestError, match="a bad word must have 1 to 8 tokens; got 9"):
        check_row(SamplingParams(), [], [tuple(range(9))], VOCAB_SIZE)
