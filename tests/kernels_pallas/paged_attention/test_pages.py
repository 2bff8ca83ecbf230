"""Quantizing keys and values loses no more than the scale implies."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention.pages import LARGEST, quantize


@pytest.mark.parametrize("dtype", list(LARGEST))
def test_quantizing_loses_no_more_than_it_says(dtype: str) -> None:
    rng = np.random.default_rng(0)
    magnitude_TK1 = 10.0 ** rng.uniform(-6, 6, size=(64, 3, 1))
    x_TKH = (rng.standard_normal((64, 3, 96)) * magnitude_TK1).astype(np.float32)
    numbers_TKH, scale_TK = quantize(jnp.asarray(x_TKH), dtype)
    assert numbers_TKH.dtype == dtype
    scale_TK1 = np.asarray(scale_TK)[..., None]
    np.testing.assert_allclose(scale_TK1 * LARGEST[dtype], abs(x_TKH).max(-1, keepdims=True), 1e-6)
    error_TKH = abs(np.asarray(numbers_TKH, np.float32) * scale_TK1 - x_TKH)
    half_a_step = scale_TK1 / 2
    if dtype != "int8":
        half_a_step = np.maximum(abs(x_TKH) / 16, scale_TK1 * 2.0**-10)
    assert np.all(error_TKH <= half_a_step * (1 + 1e-5))


@pytest.mark.parametrize("dtype", list(LARGEST))
def test_zeros_stay_zeros(dtype: str) -> None:
    numbers_TKH, scale_TK = quantize(jnp.zeros((2, 3, 8)), dtype)
    assert not np.asarray(numbers_TKH, np.float32).any() and np.all(np.asarray(scale_TK) == 1)
