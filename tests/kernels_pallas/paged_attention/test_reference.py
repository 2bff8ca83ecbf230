"""The reference against a computation that knows nothing of pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention.reference import paged_attention_reference


def test_equals_dense_causal_attention():
    key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
    q_TNH = jax.random.normal(key_q, (11, 6, 16))
    k_TKH = jax.random.normal(key_k, (11, 2, 16))
    v_TKH = jax.random.normal(key_v, (11, 2, 16))
    out_TNH, pages = paged_attention_reference(
        q_TNH,
        k_TKH,
        v_TKH,
        jnp.full((1, 4, 2, 4, 32), jnp.nan),
        0,
        jnp.array([[3, 1, 2]]),
        jnp.array([11]),
        jnp.array([0]),
        jnp.array([11]),
        scale=0.25,
    )
    dense = jax.nn.dot_product_attention(q_TNH, k_TKH, v_TKH, scale=0.25, is_causal=True)
    np.testing.assert_allclose(out_TNH, dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pages[0, 1, :, 2], np.concatenate([k_TKH[6], v_TKH[6]], -1))
    assert np.isnan(pages[0, 0]).all()


@pytest.mark.smoke
def test_a_window_a_cap_and_a_sink_by_hand():
    # One head of width 1, scores 1, 2, 3 at the last query; values 10, 20, 30.
    out_TNH, _ = paged_attention_reference(
        jnp.ones((1, 1, 1)),
        jnp.full((1, 1, 1), 3.0),
        jnp.full((1, 1, 1), 30.0),
        jnp.array([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 10.0], [2.0, 20.0]], [[0.0, 0.0]] * 2]).reshape(
            1, 3, 1, 2, 2
        ),
        0,
        jnp.array([[1, 2]]),
        jnp.array([3]),
        jnp.array([0]),
        jnp.array([1]),
        scale=1.0,
        window=2,
        soft_cap=2.0,
        sinks_N=jnp.array([0.5]),
    )
    two, three, sink = np.exp([2 * np.tanh(1.0), 2 * np.tanh(1.5), 0.5])
    expected = (20 * two + 30 * three) / (two + three + sink)
    np.testing.assert_allclose(out_TNH, [[[expected]]], rtol=1e-6)
