"""Log-probabilities against scipy, and what rows that did not ask receive."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from jinfer.sampling.logprobs import read_logprobs

read_jit = jax.jit(read_logprobs, static_argnames="max_logprobs")
NO, YES = np.zeros(6, bool), np.ones(6, bool)

LOGITS = np.random.default_rng(2).normal(size=(6, 131)).astype(np.float32) * 4
LOGITS[1, 5] = -np.inf
TOKENS = np.array([3, 5, 130, 0, 77, 8], np.int32)


def test_token_logprob_and_rank() -> None:
    got = read_jit(LOGITS, TOKENS, NO, max_logprobs=5)
    want_RV = log_softmax(LOGITS.astype(np.float64), axis=-1)
    np.testing.assert_allclose(got.token_logprob_R, want_RV[np.arange(6), TOKENS], rtol=2e-6)
    order = (-LOGITS).argsort(-1, kind="stable")
    want_rank = [1 + order[row].tolist().index(token) for row, token in enumerate(TOKENS)]
    assert np.asarray(got.rank_R).tolist() == want_rank


def test_top_logprobs_of_the_rows_that_ask() -> None:
    wants_top_R = np.array([True, False, True, False, False, True])
    got = read_jit(LOGITS, TOKENS, wants_top_R, max_logprobs=5)
    want_RV = log_softmax(LOGITS.astype(np.float64), axis=-1)
    order = (-LOGITS).argsort(-1, kind="stable")[:, :5]
    for row in range(6):
        if wants_top_R[row]:
            assert np.asarray(got.top_ids_RJ)[row].tolist() == order[row].tolist()
            np.testing.assert_allclose(
                got.top_logprobs_RJ[row], want_RV[row][order[row]], rtol=2e-6, atol=1e-6
            )
        else:
            assert (np.asarray(got.top_logprobs_RJ)[row] == -np.inf).all()
            assert (np.asarray(got.top_ids_RJ)[row] == 0).all()


def test_rank_counts_only_strictly_greater() -> None:
    logits_RV = np.array([[1.0, 2.0, 2.0, 0.0]], np.float32)
    rank = partial(read_jit, max_logprobs=1)
    ranks = [int(rank(logits_RV, np.array([t]), NO[:1]).rank_R[0]) for t in range(4)]
    assert ranks == [3, 1, 1, 4]


def test_rows_may_ask_for_nothing() -> None:
    asks_R = np.array([True, False, False, False, False, False])
    wants_top_R = np.array([False, True, False, False, False, False])
    got = read_jit(LOGITS, TOKENS, wants_top_R, max_logprobs=3, wants_token_R=asks_R)
    everyone = read_jit(LOGITS, TOKENS, YES, max_logprobs=3)
    assert np.asarray(got.rank_R)[2:].tolist() == [0] * 4
    assert (np.asarray(got.token_logprob_R)[2:] == -np.inf).all()
    # A row that wants the top wants its token too; either way the numbers are the same.
    np.testing.assert_array_equal(got.token_logprob_R[:2], everyone.token_logprob_R[:2])
    np.testing.assert_array_equal(got.top_logprobs_RJ[1], everyone.top_logprobs_RJ[1])
    silent = read_jit(LOGITS, TOKENS, NO, max_logprobs=3, wants_token_R=NO)
    assert (np.asarray(silent.token_logprob_R) == -np.inf).all()


def test_more_logprobs_than_tokens() -> None:
    got = read_jit(np.array([[0.0, 1.0]], np.float32), TOKENS[3:4], YES[:1], max_logprobs=4)
    assert np.asarray(got.top_ids_RJ).tolist() == [[1, 0, 0, 0]]
    assert np.isfinite(np.asarray(got.top_logprobs_RJ)).tolist() == [[True, True, False, False]]


def test_no_top_logprobs_at_all() -> None:
    got = read_jit(LOGITS, TOKENS, NO, max_logprobs=0)
    assert got.top_ids_RJ.shape == (6, 0)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    narrow_RV = jnp.asarray(LOGITS, jnp.bfloat16)
    got = read_jit(narrow_RV, TOKENS, NO, max_logprobs=1)
    want = read_jit(narrow_RV.astype(jnp.float32), TOKENS, NO, max_logprobs=1)
    np.testing.assert_array_equal(got.token_logprob_R, want.token_logprob_R)
