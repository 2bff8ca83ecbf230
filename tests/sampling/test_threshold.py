"""Thresholds against a sort of the whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.sampling.threshold import top_k_threshold, top_p_threshold

top_k_jit = jax.jit(top_k_threshold)
top_p_jit = jax.jit(top_p_threshold)


def weights(kind: str, vocab: int, num_rows: int = 16) -> np.ndarray:
    """Rows of exp(logit - largest), some smooth, some full of ties and zeros."""
    rng = np.random.default_rng(vocab)
    logits_RV = rng.normal(size=(num_rows, vocab)) * np.geomspace(0.01, 40, num_rows)[:, None]
    if kind == "ties":
        logits_RV = np.round(logits_RV)
    if kind == "masked":
        logits_RV[rng.random(logits_RV.shape) < 0.9] = -np.inf
        logits_RV[:, 0] = 0.0
    logits_RV = (logits_RV - logits_RV.max(-1, keepdims=True)).astype(np.float32)
    return np.exp(logits_RV)


KINDS = ("smooth", "ties", "masked")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 2, 130, 2000])
def test_top_k_is_the_kth_largest_with_its_ties(kind: str, vocab: int) -> None:
    weight_RV = weights(kind, vocab)
    sorted_RV = -np.sort(-weight_RV, axis=-1)
    for k in {1, 2, 7, vocab // 2, vocab - 1, vocab} - {0}:
        top_k_R = np.full(len(weight_RV), k, np.int32)
        threshold_R1 = np.asarray(top_k_jit(weight_RV, top_k_R))[:, None]
        kept_RV = weight_RV >= threshold_R1
        want_RV = weight_RV >= (sorted_RV[:, k - 1 : k] if k <= vocab else 0)
        np.testing.assert_array_equal(kept_RV & (weight_RV > 0), want_RV & (weight_RV > 0))


def test_top_k_per_row_and_off() -> None:
    weight_RV = np.tile(np.linspace(0, 1, 11, dtype=np.float32), (6, 1))
    top_k_R = np.array([0, -1, 11, 500, 1, 4], np.int32)
    kept_RV = weight_RV >= np.asarray(top_k_jit(weight_RV, top_k_R))[:, None]
    assert kept_RV.sum(-1).tolist() == [11, 11, 11, 11, 1, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 2, 130, 2000])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p(kind: str, vocab: int, p: float) -> None:
    weight_RV = weights(kind, vocab)
    num_rows = len(weight_RV)
    threshold_R = np.asarray(
        top_p_jit(weight_RV, np.full(num_rows, p, np.float32), np.zeros(num_rows, np.float32))
    )
    exact_RV = weight_RV.astype(np.float64)
    total_R = exact_RV.sum(-1)
    kept_RV = weight_RV >= threshold_R[:, None]
    least_R = np.where(kept_RV, exact_RV, np.inf).min(-1)
    mass_R = np.where(kept_RV, exact_RV, 0).sum(-1)
    without_least_R = np.where(exact_RV > least_R[:, None], exact_RV, 0).sum(-1)
    rounding_R = 1e-5 * total_R  # of a float32 sum over the row
    assert (mass_R >= p * total_R - rounding_R).all()
    assert ((without_least_R < p * total_R + rounding_R) | (without_least_R == 0)).all()
    assert kept_RV.any(-1).all()


def test_top_p_counts_only_what_the_floor_keeps() -> None:
    weight_RV = np.array([[1.0, 0.5, 0.25, 0.25]], np.float32)
    one = np.ones(1, np.float32)
    # Of 2.0 in all, 1.0 is not enough; of the 1.5 above the floor it is, and 0.6 of it too.
    assert float(top_p_jit(weight_RV, 0.6 * one, 0 * one)[0]) <= 0.5
    assert 0.5 < float(top_p_jit(weight_RV, 0.6 * one, 0.5 * one)[0]) <= 1.0
    assert float(top_p_jit(weight_RV, one, 0.5 * one)[0]) == 0.5


def test_a_row_of_nothing_ends() -> None:
    zero_RV, zero_R = jnp.zeros((2, 9)), jnp.zeros(2)
    assert np.asarray(top_k_jit(zero_RV, jnp.full(2, 3, jnp.int32))).shape == (2,)
    assert np.isfinite(np.asarray(top_p_jit(zero_RV, zero_R + 0.9, zero_R))).all()


def test_no_sort_of_the_vocabulary() -> None:
    weight_RV, row_R = jnp.ones((2, 500)), jnp.ones(2)
    text = str(jax.make_jaxpr(top_p_threshold)(weight_RV, row_R, row_R))
    text += str(jax.make_jaxpr(top_k_threshold)(weight_RV, row_R.astype(jnp.int32)))
    assert "while" in text and "sort" not in text and "top_k" not in text
