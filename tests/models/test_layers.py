"""The parts of a layer by themselves, where whole models would not tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.models.layers import FEW_TOKENS, project


@pytest.mark.parametrize("num_tokens", [1, 7, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize(
    ("dtype", "wanted", "rtol"),
    [("float32", None, 1e-5), ("bfloat16", None, 1e-2), ("bfloat16", "float32", 1e-5)],
)
def test_a_projection_is_a_product_with_the_outputs_first(
    num_tokens: int, dtype: str, wanted: str | None, rtol: float
) -> None:
    rng = np.random.default_rng(num_tokens)
    x_TD = jnp.asarray(rng.normal(size=(num_tokens, 48)), dtype)
    weight_CD = jnp.asarray(rng.normal(size=(80, 48)), dtype)
    got_TC = jax.jit(lambda x_TD, w_CD: project(x_TD, w_CD, dtype=wanted))(x_TD, weight_CD)
    want_TC = np.asarray(x_TD, np.float64) @ np.asarray(weight_CD, np.float64).T
    assert got_TC.dtype == (wanted or dtype)
    np.testing.assert_allclose(np.asarray(got_TC, np.float64), want_TC, rtol=rtol, atol=rtol * 10)
