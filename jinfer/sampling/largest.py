"""Finds the few largest numbers of each row, without sorting it.

For more than 16, XLA for GPUs sorts whole rows with 21 kernels. They take longer to compile than
all the rest of a step's logprobs, and make dozens of passes over 256 rows of 128,256 logits.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

_LANES = 128  # numbers per block
_NONE = jnp.iinfo(jnp.int32).min  # below every number


class _Taken(NamedTuple):
    """Progress of each row: `key_R` and `id_R` belong to the last number taken."""

    key_R: Array
    id_R: Array
    best_RX: Array  # the largest key not yet taken, per block


def largest(
    logits_RV: Float[Array, "R V"], count: int
) -> tuple[Float[Array, "R J"], Int32[Array, "R J"]]:
    """Like `lax.top_k`: the `count` largest numbers of each row and their indices, ties in order.

    First finds the largest number of each block of 128. Then repeats: takes the largest of these,
    and searches only its block for the next largest.

    Args:
      logits_RV: float32. NaN counts as larger than +inf, below -inf if its sign is set.
      count: J, at most V.
    """
    spare = -logits_RV.shape[-1] % _LANES
    key_RV = jnp.maximum(_key(logits_RV), _NONE + 1)
    key_RV = jnp.pad(key_RV, ((0, 0), (0, spare)), constant_values=_NONE)
    key_RX128 = key_RV.reshape(len(key_RV), -1, _LANES)
    lane_128 = jnp.arange(_LANES, dtype=jnp.int32)
    block_X = jnp.arange(key_RX128.shape[1], dtype=jnp.int32)

    def take(taken: _Taken, _: None) -> tuple[_Taken, tuple[Array, Array]]:
        block_R = jnp.argmax(taken.best_RX, axis=-1).astype(jnp.int32)
        block_R1 = block_R[:, None]
        key_R128 = jnp.take_along_axis(key_RX128, block_R1[:, :, None], axis=1)[:, 0]
        id_R128 = block_R1 * _LANES + lane_128
        left_R128 = _behind(key_R128, id_R128, taken.key_R, taken.id_R)
        key_R = jnp.max(left_R128, axis=-1)
        lane_R = jnp.argmax(left_R128, axis=-1).astype(jnp.int32)
        id_R = block_R * _LANES + lane_R
        left_R = jnp.max(_behind(key_R128, id_R128, key_R, id_R), axis=-1)
        best_RX = jnp.where(block_X == block_R1, left_R[:, None], taken.best_RX)
        return _Taken(key_R, id_R, best_RX), (key_R, id_R)

    above_R = jnp.full(len(key_RV), jnp.iinfo(jnp.int32).max)
    start = _Taken(above_R, jnp.full_like(above_R, -1), jnp.max(key_RX128, axis=-1))
    _, (key_JR, id_JR) = lax.scan(take, start, length=count)
    return _number(key_JR.T), id_JR.T


def _behind(key_R128: Array, id_R128: Array, key_R: Array, id_R: Array) -> Array:
    """The keys not yet taken, which come after the given ones; `_NONE` for the others."""
    key_R1, id_R1 = key_R[:, None], id_R[:, None]
    is_behind_R128 = (key_R128 < key_R1) | ((key_R128 == key_R1) & (id_R128 > id_R1))
    return jnp.where(is_behind_R128, key_R128, _NONE)


def _key(number: Float[Array, "..."]) -> Int32[Array, "..."]:
    """An integer ordered as the number: its bits, inverted after the sign if negative."""
    bits = lax.bitcast_convert_type(number, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _number(key: Int32[Array, "..."]) -> Float[Array, "..."]:
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return lax.bitcast_convert_type(bits, jnp.float32)
