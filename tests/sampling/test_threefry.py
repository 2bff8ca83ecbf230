"""Threefry against that of jax.random."""

import jax
import jax.numpy as jnp
import numpy as np

from jinfer.sampling.threefry import fold_in, random_bits


def test_keys_and_bits_are_those_of_jax() -> None:
    rng = np.random.default_rng(0)
    key_R2 = jnp.asarray(rng.integers(0, 2**32, (5, 2), dtype=np.uint32))
    position_R = jnp.asarray([0, 1, 77, 12_345, 2**31 - 1], jnp.int32)
    wrapped_R = jax.random.wrap_key_data(key_R2, impl="threefry2x32")
    wrapped_R = jax.vmap(jax.random.fold_in)(wrapped_R, position_R)
    folded_R2 = fold_in(key_R2, position_R)
    np.testing.assert_array_equal(folded_R2, jax.random.key_data(wrapped_R))
    with jax.threefry_partitionable(True):
        want_RJ = jax.vmap(lambda key: jax.random.bits(key, (300,)))(wrapped_R)
    np.testing.assert_array_equal(random_bits(folded_R2, 300), want_RJ)
    np.testing.assert_array_equal(random_bits(folded_R2, 7), want_RJ[:, :7])
