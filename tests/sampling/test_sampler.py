"""The sampler draws what transformers' processors say, and the same alone as in company."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jinfer.parallel.collectives import WHOLE, Shards
from jinfer.sampling import masks, sampler
from jinfer.sampling.sampler import (
    NAN_TOKEN,
    SamplingState,
    empty_state,
    record,
    sample,
    unpack_bits,
)
from jinfer.sampling.xla_workarounds import rows_one_by_one

GOLDEN = json.loads((Path(__file__).parent / "sampler_goldens.json").read_text())
LOGITS_V = np.asarray(GOLDEN["logits"], dtype=np.float32)
VOCAB = len(LOGITS_V)  # 200: a multiple neither of 32 nor of 128
NUM_DRAWS = 20_000

sample_jit = jax.jit(sample)
record_jit = jax.jit(record, donate_argnums=0)


def request_row(params: dict[str, Any], *, seed: int = 7, vocab: int = VOCAB) -> SamplingState:
    """One admitted row, on the host, after the golden file's prompt and output."""
    bias = {int(token): value for token, value in params.get("logit_bias", {}).items()}
    bias_ids_J, bias_values_J = masks.pad_bias(bias, vocab)
    words = params.get("bad_words", [])
    single = [word[0] for word in words if len(word) == 1]
    fields = {
        "temperature_A": params.get("temperature", 0.0),
        "top_k_A": params.get("top_k", 0),
        "top_p_A": params.get("top_p", 1.0),
        "min_p_A": params.get("min_p", 0.0),
        "repetition_penalty_A": params.get("repetition_penalty", 1.0),
        "presence_penalty_A": params.get("presence_penalty", 0.0),
        "frequency_penalty_A": params.get("frequency_penalty", 0.0),
        "seed_A2": masks.seed_words(seed, 0),
        "min_length_A": len(GOLDEN["prompt_ids"]) + params.get("min_tokens", 0),
        "stop_ids_AJ": masks.pad_stop_ids(GOLDEN["stop_ids"], vocab),
        "bias_ids_AJ": bias_ids_J,
        "bias_values_AJ": bias_values_J,
        "allowed_bits_AW": masks.allowed_bits(
            vocab, allowed_ids=params.get("allowed_ids"), banned_ids=single
        ),
        "bad_words_AJ8": masks.pad_bad_words([word for word in words if len(word) > 1], vocab),
        "prompt_bits_AW": masks.pack_bits(GOLDEN["prompt_ids"], vocab),
        "recent_A7": masks.recent_window(GOLDEN["output_ids"], vocab),
        "output_count_AV": np.bincount(GOLDEN["output_ids"], minlength=vocab),
    }
    blank = empty_state(1, vocab, np)
    return dataclasses.replace(
        blank,
        **{
            name: np.asarray(value, dtype=getattr(blank, name).dtype)[None]
            for name, value in fields.items()
        },
    )


def slots_of(*rows: SamplingState) -> SamplingState:
    """The rows as slots 0, 1, ... and a bin after them."""
    vocab = rows[0].output_count_AV.shape[-1]
    return jax.tree.map(
        lambda *leaves: jnp.asarray(np.concatenate(leaves)), *rows, empty_state(1, vocab, np)
    )


def draw_many(logits_V: np.ndarray, row: SamplingState, num_samples: int = NUM_DRAWS) -> np.ndarray:
    """One draw at each of the positions that follow the golden output."""
    first = len(GOLDEN["prompt_ids"]) + len(GOLDEN["output_ids"])
    logits_RV = jnp.broadcast_to(jnp.asarray(logits_V), (num_samples, len(logits_V)))
    position_R = first + jnp.arange(num_samples, dtype=jnp.int32)
    # All draws stand at the golden position for min_tokens: 100 reaches past none of them.
    row = dataclasses.replace(
        row, min_length_A=np.where(row.min_length_A > first, np.int32(2**30), row.min_length_A)
    )
    slot_R = jnp.zeros(num_samples, jnp.int32)
    return np.asarray(sample_jit(logits_RV, slots_of(row), slot_R, position_R))


def chi_square_p(token_R: np.ndarray, probs_V: np.ndarray) -> float:
    """p-value of the draws; tokens expected fewer than five times are counted together."""
    expected_V = probs_V * len(token_R)
    observed_V = np.bincount(token_R, minlength=len(probs_V)).astype(float)
    rare_V = expected_V < 5.0
    observed = np.append(observed_V[~rare_V], observed_V[rare_V].sum())
    expected = np.append(expected_V[~rare_V], expected_V[rare_V].sum())
    if expected[-1] < 5.0:  # too few even together: they join the last of the others
        observed = np.append(observed[:-2], observed[-2:].sum())
        expected = np.append(expected[:-2], expected[-2:].sum())
    if len(expected) == 1:
        return float(observed[0] == len(token_R))
    expected *= observed.sum() / expected.sum()
    return float(stats.chisquare(observed, expected).pvalue)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_draws_follow_transformers(name: str) -> None:
    case = GOLDEN["cases"][name]
    probs_V = np.asarray(case["probs"])
    token_R = draw_many(LOGITS_V, request_row(case["params"]))
    assert (probs_V[token_R] > 0).all()
    assert chi_square_p(token_R, probs_V) > 1e-3


@pytest.mark.parametrize("name", ["plain", "repetition", "top_k_top_p_min_p", "everything"])
def test_the_wrong_distribution_would_be_noticed(name: str) -> None:
    other = "hot" if name != "hot" else "cold"
    token_R = draw_many(LOGITS_V, request_row(GOLDEN["cases"][name]["params"]))
    assert chi_square_p(token_R, np.asarray(GOLDEN["cases"][other]["probs"])) < 1e-9


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.smoke if name == "plain" else ())
        for name in GOLDEN["cases"]
        if "_p" not in name
    ],
)
def test_temperature_zero_takes_the_mode(name: str) -> None:
    case = GOLDEN["cases"][name]
    row = request_row({**case["params"], "temperature": 0.0})
    assert (draw_many(LOGITS_V, row) == np.argmax(case["probs"])).all()


def test_a_large_vocabulary_over_many_blocks() -> None:
    rng = np.random.default_rng(3)
    logits_V = rng.normal(size=1337).astype(np.float32)
    probs_V = np.exp(logits_V.astype(np.float64))
    blank = empty_state(1, 1337, np)
    row = dataclasses.replace(blank, temperature_A=blank.temperature_A + 1)
    token_R = draw_many(logits_V, row)
    assert chi_square_p(token_R, probs_V / probs_V.sum()) > 1e-3


# A row's token is its own affair.


def mixed_batch() -> tuple[jax.Array, SamplingState, jax.Array]:
    """Every golden case as one slot, with logits and positions of its own."""
    cases = enumerate(GOLDEN["cases"].values())
    rows = [request_row(case["params"], seed=1000 + i) for i, case in cases]
    greedy = request_row({})
    state = slots_of(*rows, greedy)
    rng = np.random.default_rng(5)
    logits_RV = jnp.asarray(rng.normal(size=(len(rows) + 1, VOCAB)) * 2, jnp.float32)
    return logits_RV, state, jnp.arange(len(rows) + 1, dtype=jnp.int32) + 40


@pytest.mark.parametrize("num_rows", [1, 8])
def test_same_token_alone_or_among_others(num_rows: int) -> None:
    logits_RV, state, position_R = mixed_batch()
    slot_R = jnp.arange(logits_RV.shape[0], dtype=jnp.int32)
    together_R = np.asarray(sample_jit(logits_RV, state, slot_R, position_R))
    order = np.random.default_rng(num_rows).permutation(len(slot_R))
    for start in range(0, len(order), num_rows):
        some = order[start : start + num_rows]
        some = np.append(some, np.repeat(some[-1], num_rows - len(some)))
        got = sample_jit(logits_RV[some], state, slot_R[some], position_R[some])
        np.testing.assert_array_equal(np.asarray(got), together_R[some])


def test_random_neighbours_of_any_spread_change_nothing() -> None:
    vocab, row_R = 3001, np.arange(6)
    rng = np.random.default_rng(8)
    logits_RV = (rng.normal(size=(6, vocab)) * np.geomspace(0.1, 30, 6)[:, None]).astype(np.float32)
    state = dataclasses.replace(
        empty_state(7, vocab),
        temperature_A=jnp.ones(7),
        top_p_A=jnp.full(7, 0.9),
        top_k_A=jnp.array([0, 5, 500, 0, 2000, 50, 0], jnp.int32),
        seed_A2=jnp.arange(14, dtype=jnp.uint32).reshape(7, 2),
    )
    for position in range(20):
        position_R = jnp.full(6, position, jnp.int32)
        together_R = np.asarray(sample_jit(logits_RV, state, row_R, position_R))
        alone = [
            int(sample_jit(logits_RV[i : i + 1], state, row_R[i : i + 1], position_R[:1])[0])
            for i in row_R
        ]
        assert together_R.tolist() == alone


def test_one_program_serves_every_request() -> None:
    draw_many(LOGITS_V, request_row({}))
    num_programs = sample_jit._cache_size()
    for case in GOLDEN["cases"].values():
        draw_many(LOGITS_V, request_row(case["params"]))
    assert sample_jit._cache_size() == num_programs


# Seeds and positions.


def uniform_tokens(seed_words_R2: np.ndarray, position_R: np.ndarray) -> np.ndarray:
    """One draw per row from 64 equal logits."""
    num_rows = len(position_R)
    state = dataclasses.replace(
        empty_state(num_rows + 1, 64, np), temperature_A=np.ones(num_rows + 1, np.float32)
    )
    state.seed_A2[:num_rows] = seed_words_R2
    slot_R = np.arange(num_rows, dtype=np.int32)
    logits_RV = jnp.zeros((num_rows, 64))
    return np.asarray(sample_jit(logits_RV, state, slot_R, position_R.astype(np.int32)))


@jax.jit
def race_jit(weight_RV: jax.Array, seed_R2: jax.Array, position_R: jax.Array) -> jax.Array:
    return sampler._race(weight_RV, seed_R2, position_R, WHOLE)


def race(weight_RV: Any, seed_R2: Any, position_R: Any) -> np.ndarray:
    """One draw per row of weights, of which the largest is 1."""
    return np.asarray(race_jit(weight_RV, seed_R2, position_R))


def independent_p(left_R: np.ndarray, right_R: np.ndarray) -> float:
    """p-value of two series of 64 tokens being independent, tokens grouped by eight."""
    table, _, _ = np.histogram2d(left_R, right_R, bins=8, range=[[0, 64], [0, 64]])
    return float(stats.chi2_contingency(table).pvalue)


def test_positions_draw_independently_and_evenly() -> None:
    position_R = np.arange(4000)
    token_R = uniform_tokens(np.tile(masks.seed_words(11, 0), (4000, 1)), position_R)
    assert stats.chisquare(np.bincount(token_R, minlength=64)).pvalue > 1e-3
    assert independent_p(token_R[:-1], token_R[1:]) > 1e-3
    assert independent_p(token_R[:-7], token_R[7:]) > 1e-3


def test_neighbouring_seeds_and_continuations_draw_independently() -> None:
    position_R = np.full(4000, 12)
    by_seed_R = uniform_tokens(np.stack([masks.seed_words(s, 0) for s in range(4000)]), position_R)
    by_index_R = uniform_tokens(np.stack([masks.seed_words(5, i) for i in range(4000)]), position_R)
    for token_R in (by_seed_R, by_index_R):
        assert stats.chisquare(np.bincount(token_R, minlength=64)).pvalue > 1e-3
        assert independent_p(token_R[:-1], token_R[1:]) > 1e-3
    assert independent_p(by_seed_R, by_index_R) > 1e-3


def test_all_64_bits_of_a_seed_count() -> None:
    seeds = [3, 3 + 2**32, 3 + 2**63, -3, 2**64 - 1]
    drawn = [
        uniform_tokens(np.tile(masks.seed_words(seed, 0), (4000, 1)), np.arange(4000)).tolist()
        for seed in seeds
    ]
    assert len({tuple(tokens) for tokens in drawn}) == len(seeds)


def numbers_of(seed: int, position: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The exponential numbers of 128 lanes and of the blocks, as the key's definition has them."""
    key = jax.random.fold_in(jax.random.key(seed), position)
    bits = np.asarray(jax.random.bits(key, (128 + num_blocks,)))
    exponential = -np.log1p(-(bits + 0.5) / 2**32)
    return exponential[:128], exponential[128:]


def test_the_key_is_fold_in_of_seed_and_position() -> None:
    seed_R2 = np.tile(masks.seed_words(9, 0), (4000, 1))
    token_R = uniform_tokens(seed_R2, np.arange(4000))  # 64 tokens: one block
    assert token_R[33] == numbers_of(9, 33, 1)[0][:64].argmin()
    one_each_RV = jnp.zeros((4000, 20 * 128)).at[:, ::128].set(1.0)
    token_R = race(one_each_RV, seed_R2, jnp.arange(4000))
    assert token_R[33] == 128 * numbers_of(9, 33, 20)[1].argmin()


@pytest.mark.parametrize("partitionable", [True, False])
def test_more_blocks_leave_the_numbers_of_the_first_ones(partitionable: bool) -> None:
    seed_R2, position_R = jnp.arange(6, dtype=jnp.uint32).reshape(3, 2), jnp.arange(3)
    with jax.threefry_partitionable(partitionable):
        lane_R128, block_RJ = sampler._exponentials(seed_R2, position_R, 2)
        more_lane_R128, more_block_RJ = sampler._exponentials(seed_R2, position_R, 700)
    np.testing.assert_array_equal(lane_R128, more_lane_R128)
    np.testing.assert_array_equal(block_RJ, more_block_RJ[:, :2])


def test_exponentials_are_those_of_mean_one_down_to_the_smallest() -> None:
    seed_R2 = jnp.arange(2000, dtype=jnp.uint32).reshape(1000, 2)
    parts = sampler._exponentials(seed_R2, jnp.zeros(1000, jnp.int32), 872)
    number = np.concatenate([np.ravel(part) for part in parts])
    assert number.min() > 0 and np.isfinite(number).all()
    assert stats.kstest(number, "expon").pvalue > 1e-3
    assert len(np.unique(np.sort(number)[:1000])) > 990  # of 24 bits, some 30 would be equal


def test_rare_tokens_are_drawn_as_often_as_they_should_be() -> None:
    # One token in ten thousand is not the likeliest: half of these stand in its block, half in 49
    # others.
    likeliest, num_samples = 700, 400_000
    weight_V = np.full(50 * 128, 0.5e-4 / (49 * 128), np.float32)
    weight_V[640:768] = 0.5e-4 / 127
    weight_V[likeliest] = 1.0
    rare: list[int] = []
    for start in range(0, num_samples, 4000):
        seed_R2 = np.tile(masks.seed_words(3, 0), (4000, 1))
        token_R = race(np.tile(weight_V, (4000, 1)), seed_R2, jnp.arange(start, start + 4000))
        rare.extend(token_R[token_R != likeliest].tolist())
    num_within = sum(token // 128 == likeliest // 128 for token in rare)
    assert stats.binomtest(num_within, num_samples, 0.5e-4).pvalue > 1e-3
    assert stats.binomtest(len(rare) - num_within, num_samples, 0.5e-4).pvalue > 1e-3
    assert len(set(rare)) > 0.9 * len(rare)


# Edges.


def draw_one(logits: Any, **fields: Any) -> list[int]:
    """32 draws from a single row of logits."""
    logits_V = jnp.asarray(logits)
    state = empty_state(2, logits_V.shape[0])
    changed = {
        name: jnp.full_like(getattr(state, name), value).at[-1].set(getattr(state, name)[-1])
        for name, value in {"temperature_A": 1.0, **fields}.items()
    }
    state = dataclasses.replace(state, **changed)
    logits_RV = jnp.broadcast_to(logits_V, (32, logits_V.shape[0]))
    slot_R = jnp.zeros(32, jnp.int32)
    return np.asarray(sample_jit(logits_RV, state, slot_R, jnp.arange(32))).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-20, 1.0, 1e20])
@pytest.mark.parametrize("vocab", [1, 200])
def test_only_one_token_left(temperature: float, vocab: int) -> None:
    survivor = vocab - 1
    logits_V = np.full(vocab, -np.inf, np.float32)
    logits_V[survivor] = -1e30
    assert set(draw_one(logits_V, temperature_A=temperature, top_p_A=0.5, top_k_A=3)) == {survivor}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_to_draw_gives_token_zero(temperature: float) -> None:
    got = draw_one(np.full(200, -np.inf, np.float32), temperature_A=temperature, top_p_A=0.9)
    assert set(got) == {0}


def test_everything_banned_gives_token_zero() -> None:
    assert set(draw_one(np.ones(200, np.float32), allowed_bits_AW=0)) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("nans", [[3, 150], [0], range(200)])
def test_a_nan_in_a_row_is_told_by_a_token_that_there_is_not(
    temperature: float, nans: list[int]
) -> None:
    logits_V = np.zeros(200, np.float32)
    logits_V[170] = np.inf
    assert set(draw_one(logits_V, temperature_A=temperature)) == {170}
    logits_V[nans] = np.nan
    assert set(draw_one(logits_V, temperature_A=temperature)) == {NAN_TOKEN}
    only_20 = masks.allowed_bits(200, allowed_ids=[20])  # masked logits may be anything
    got = draw_one(logits_V, temperature_A=temperature, allowed_bits_AW=only_20)
    assert set(got) == ({NAN_TOKEN} if 20 in nans else {20})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_nan_changes_no_other_row(temperature: float) -> None:
    row = dataclasses.replace(
        empty_state(1, 200, np), temperature_A=np.full(1, temperature, np.float32)
    )
    logits_RV = np.random.default_rng(0).normal(size=(8, 200)).astype(np.float32)
    slot_R, position_R = jnp.zeros(8, jnp.int32), jnp.arange(8, dtype=jnp.int32)
    want_R = np.array(sample_jit(logits_RV, slots_of(row), slot_R, position_R))
    logits_RV[5, 7] = np.nan
    want_R[5] = NAN_TOKEN
    got_R = sample_jit(logits_RV, slots_of(row), slot_R, position_R)
    np.testing.assert_array_equal(got_R, want_R)


def test_a_nan_in_any_shard_is_told_to_all() -> None:
    mesh = jax.make_mesh((4,), ("chips",), axis_types=(jax.sharding.AxisType.Auto,))
    cut, every = jax.P(None, "chips"), jax.P()
    argmax = jax.shard_map(
        partial(sampler._argmax, shards=Shards("chips")), mesh=mesh, in_specs=cut, out_specs=every
    )
    logits_RV = np.tile(np.arange(8, dtype=np.float32) % 7, (4, 1))
    logits_RV[1, 5] = np.nan
    logits_RV[2] = np.nan
    logits_RV[3] = -np.inf
    assert jax.jit(argmax)(logits_RV).tolist() == [6, NAN_TOKEN, NAN_TOKEN, 0]


def test_greedy_ties_take_the_lowest_id() -> None:
    logits_V = np.zeros(200, np.float32)
    logits_V[[77, 140]] = 2.0
    assert set(draw_one(logits_V, temperature_A=0.0)) == {77}


@pytest.mark.parametrize("fields", [{"top_k_A": 1}, {"top_p_A": 0.05}, {"top_p_A": 0.0}])
def test_ties_at_the_threshold_are_all_kept(fields: dict[str, float]) -> None:
    logits_V = np.zeros(200, np.float32)
    logits_V[[77, 140]] = 2.0
    assert set(draw_one(logits_V, **fields)) == {77, 140}


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_narrow_logits_are_read_as_float32(dtype: str) -> None:
    narrow_V = jnp.asarray(LOGITS_V, dtype)
    assert draw_one(narrow_V) == draw_one(narrow_V.astype(jnp.float32))


def test_no_token_without_weight_is_ever_drawn() -> None:
    weight_RV = np.zeros((3, 300), np.float32)  # the last block is a part of one
    weight_RV[0, 290:] = 1.0
    weight_RV[1, [20, 256]] = 1.0, 1e-30
    for turn in range(0, 300, 13):
        turned_RV = np.roll(weight_RV, turn, axis=1)
        for position in range(5):
            token_R = race(turned_RV, np.full((3, 2), turn, np.uint32), np.full(3, position))
            assert turned_RV[0, token_R[0]] > 0
            assert token_R[1:].tolist() == [(20 + turn) % 300, 0]


def test_a_state_of_another_vocabulary_is_refused() -> None:
    zero_R = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=r"as wide as the logits; got V=8 .* V=16.*empty_state"):
        sample(jnp.zeros((1, 16)), empty_state(2, 8), zero_R, zero_R)


# History.


def test_record_keeps_counts_and_window_of_the_drawn_rows_only() -> None:
    state = empty_state(4, 50)  # slots 0-2 and the bin
    sampled_ids: dict[int, list[int]] = {0: [], 1: [], 2: []}
    rng = np.random.default_rng(1)
    for _ in range(12):
        slot_R = rng.permutation(3)
        token_R = rng.integers(0, 50, size=3)
        sampled_R = rng.random(3) < 0.7
        state = record_jit(state, slot_R, token_R, sampled_R)
        for slot, token, drawn in zip(slot_R, token_R, sampled_R, strict=True):
            if drawn:
                sampled_ids[int(slot)].append(int(token))
    for slot, ids in sampled_ids.items():
        np.testing.assert_array_equal(state.output_count_AV[slot], np.bincount(ids, minlength=50))
        np.testing.assert_array_equal(state.recent_A7[slot], masks.recent_window(ids, 50))


def test_record_updates_in_place() -> None:
    state, slot_R = empty_state(9, 4096), jnp.arange(8, dtype=jnp.int32)
    memory = record_jit.lower(state, slot_R, slot_R, slot_R >= 0).compile().memory_analysis()
    assert memory.temp_size_in_bytes < state.output_count_AV[0].nbytes


def test_a_bad_word_is_never_completed() -> None:
    vocab, words = 4, [[1, 2], [3, 3, 0], [0]]
    row = dataclasses.replace(
        empty_state(1, vocab, np),
        temperature_A=np.ones(1, np.float32),
        bad_words_AJ8=masks.pad_bad_words(words, vocab)[None],
    )
    state, slot_R = slots_of(row), jnp.zeros(1, jnp.int32)
    ids: list[int] = []
    for position in range(200):
        token_R = sample_jit(jnp.zeros((1, vocab)), state, slot_R, jnp.full(1, position))
        state = record_jit(state, slot_R, token_R, jnp.ones(1, bool))
        ids.append(int(token_R[0]))
    text = "".join(map(str, ids))
    assert "12" not in text and "0" not in text
    assert set(text) == {"1", "2", "3"}


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 200])
def test_unpack_reads_what_the_host_packed(vocab: int) -> None:
    flag_V = np.random.default_rng(vocab).random(vocab) < 0.5
    bits_W = masks.pack_bits(np.flatnonzero(flag_V), vocab)
    np.testing.assert_array_equal(unpack_bits(jnp.asarray(bits_W)[None], vocab)[0], flag_V)


def test_rows_taken_in_turn_are_those_that_a_gather_takes() -> None:
    all_AV = jnp.arange(5 * 7, dtype=jnp.int32).reshape(5, 7)
    slot_R = jnp.array([4, 0, 0, 3])
    rows_RV = rows_one_by_one(all_AV, slot_R)
    np.testing.assert_array_equal(rows_RV, all_AV[slot_R])


@pytest.mark.parametrize("num_rows", [1, 6, 8, 20, 32])
def test_sums_of_tiles_are_those_of_blocks(num_rows: int) -> None:
    weight_RV = jnp.asarray(np.random.default_rng(num_rows).random((num_rows, 5 * 128)), "float32")
    sums = sampler._sum_tiles(weight_RV), sampler._sum_blocks(weight_RV)
    np.testing.assert_allclose(*sums, rtol=1e-6)
    assert sums[0].shape == (num_rows, 5)
