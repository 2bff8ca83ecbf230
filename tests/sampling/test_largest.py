"""The few largest of each row are those of `lax.top_k`."""

import jax
import numpy as np
import pytest
from jax import lax

from jinfer.sampling.largest import largest

NUM_ROWS = 7


def random_rows(kind: str, length: int) -> np.ndarray:
    rng = np.random.default_rng(length)
    numbers_RV = rng.normal(size=(NUM_ROWS, length)).astype(np.float32)
    if kind == "ties":
        numbers_RV = np.round(numbers_RV) + 100
    if kind == "signed zeros":
        numbers_RV = np.where(numbers_RV > 0, np.float32(0), np.float32(-0.0))
    if kind == "nothing":
        numbers_RV[:] = -np.inf
    if kind == "not finite":
        for share, value in ((0.3, -np.inf), (0.1, np.inf), (0.05, np.nan), (0.05, -np.nan)):
            numbers_RV[rng.random(numbers_RV.shape) < share] = value
    return numbers_RV


@pytest.mark.parametrize("kind", ["distinct", "ties", "signed zeros", "nothing", "not finite"])
@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 3001])
def test_they_are_those_of_top_k(length: int, kind: str) -> None:
    numbers_RV = random_rows(kind, length)
    for count in {1, min(20, length), min(130, length)}:
        got = jax.jit(largest, static_argnums=1)(numbers_RV, count)
        want = lax.top_k(numbers_RV, count)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_none_at_all() -> None:
    values_RJ, ids_RJ = largest(jax.numpy.zeros((NUM_ROWS, 131)), 0)
    assert values_RJ.shape == ids_RJ.shape == (NUM_ROWS, 0)
