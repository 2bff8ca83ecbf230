"""Random bits from a key and a counter: `jax.random`'s threefry, as plain arithmetic.

Its results equal those of `jax.random.fold_in` and `jax.random.bits`. XLA for CPUs compiles
JAX's own formulation, a loop over rotations by variable amounts, ten times as long.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.2:
  Threefry-2x32 with 20 rounds.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of odd and even groups of four rounds
_PARITY = 0x1BD11BDA  # of Skein's key schedule


def fold_in(key_R2: UInt32[Array, "R 2"], data_R: Int32[Array, "R"]) -> UInt32[Array, "R 2"]:
    """One new key per row, from a key and a number: `jax.random.fold_in`."""
    data_R = data_R.astype(jnp.uint32)
    return jnp.stack(_threefry(key_R2[:, 0], key_R2[:, 1], jnp.zeros_like(data_R), data_R), axis=-1)


def random_bits(key_R2: UInt32[Array, "R 2"], count: int) -> UInt32[Array, "R J"]:
    """`count` words of 32 random bits per key: `jax.random.bits` with partitionable keys.

    A word depends on its index, not on `count`.
    """
    index_1J = jnp.arange(count, dtype=jnp.uint32)[None]
    high, low = _threefry(key_R2[:, :1], key_R2[:, 1:], jnp.zeros_like(index_1J), index_1J)
    return high ^ low


def _threefry(key0: Array, key1: Array, word0: Array, word1: Array) -> tuple[Array, Array]:
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
    word0, word1 = word0 + keys[0], word1 + keys[1]
    for group in range(5):
        for amount in _ROTATIONS[group % 2]:
            word0 = word0 + word1
            word1 = word0 ^ ((word1 << amount) | (word1 >> (32 - amount)))
        word0 = word0 + keys[(group + 1) % 3]
        word1 = word1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return word0, word1
