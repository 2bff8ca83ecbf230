"""Top-k and top-p as thresholds on the weights of a row, found without sorting the vocabulary.

A weight is exp((logit - largest logit) / temperature), within [0, 1]. Its float32 bits, read as an
integer, have the same order. The count and the mass of the weights >= t fall as t grows, so
bisection over integers finds t. It takes at most 30 passes of compare-and-sum over [R, V]; a sort
of 128,256 logits takes the time of several hundred. If several chips shard the vocabulary, each
pass sums one number per row over them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jinfer.parallel.collectives import WHOLE, Shards

_ABOVE_ONE = 0x3F800001  # one past the bits of 1.0, the largest weight


class _Bracket(NamedTuple):
    """Per row, as bits of weights: `low` reaches the target amount and `high` does not."""

    low_R: Array
    high_R: Array
    amount_low_R: Array  # count or mass of the weights >= low
    amount_high_R: Array


def top_k_threshold(
    weight_RV: Float[Array, "R V"], top_k_R: Int32[Array, "R"], shards: Shards = WHOLE
) -> Array:
    """Smallest weight float32[R] that top-k keeps: the k-th largest, so its ties are kept too.

    Args:
      weight_RV: float32 in [0, 1].
      top_k_R: k; if 0 or less, or V or more, everything is kept (threshold 0).
      shards: the shards of V.
    """
    bits_RV = _bits(weight_RV)
    vocab_size = shards.whole(weight_RV.shape[-1])
    off_R = (top_k_R <= 0) | (top_k_R >= vocab_size)
    given_token_R = jnp.where(off_R, vocab_size, top_k_R)
    zero_R = jnp.zeros_like(given_token_R)

    def count(low_R: Array) -> Array:
        return shards.sum(jnp.sum(bits_RV >= low_R[:, None], axis=-1, dtype=jnp.int32))

    def settled(bracket: _Bracket) -> Array:
        return bracket.amount_low_R == given_token_R

    start = _Bracket(zero_R, zero_R + _ABOVE_ONE, zero_R + vocab_size, zero_R)
    return _value(_bisect(start, count, given_token_R, settled))


def top_p_threshold(
    weight_RV: Float[Array, "R V"],
    top_p_R: Float[Array, "R"],
    floor_R: Float[Array, "R"],
    shards: Shards = WHOLE,
) -> Array:
    """Smallest weight float32[R] that top-p keeps among the weights that reach the floor.

    Keeps the fewest most probable tokens whose mass is at least p of the total, and all ties of
    the least of them; never fewer than one.

    Args:
      weight_RV: float32 in [0, 1].
      top_p_R: p; 1 or more keeps everything.
      floor_R: threshold of the transform before (top-k); weights below it count as zero.
      shards: the shards of V.
    """
    bits_RV = _bits(weight_RV)

    def mass(low_R: Array) -> Array:
        kept_RV = jnp.where(bits_RV >= low_R[:, None], weight_RV, 0.0)
        return shards.sum(jnp.sum(kept_RV, axis=-1))

    floor_bits_R = _bits(floor_R)
    total_R = mass(floor_bits_R)
    given_token_R = top_p_R * total_R

    def settled(bracket: _Bracket) -> Array:
        # Only one weight lies in [low, high): two would weigh at least twice `low`. Test this only
        # if a weight is far above the rounding error of a sum.
        low_weight_R = _value(bracket.low_R)
        gap_R = bracket.amount_low_R - bracket.amount_high_R
        alone_R = (gap_R < 1.5 * low_weight_R) & (low_weight_R > 1e-4 * total_R)
        return alone_R | (top_p_R >= 1.0)

    high_R = jnp.full_like(floor_bits_R, _ABOVE_ONE)
    start = _Bracket(floor_bits_R, high_R, total_R, jnp.zeros_like(total_R))
    return _value(_bisect(start, mass, given_token_R, settled))


def _bisect(
    start: _Bracket,
    measure: Callable[[Array], Array],
    given_token_R: Array,
    settled: Callable[[_Bracket], Bool[Array, "R"]],
) -> Array:
    """Largest bits int32[R] whose measure reaches the target, or bits that keep the same tokens.

    A settled row no longer changes, so its result does not depend on the other rows.
    """

    def open_rows(bracket: _Bracket) -> Array:
        return (bracket.high_R - bracket.low_R > 1) & ~settled(bracket)

    def halve(bracket: _Bracket) -> _Bracket:
        low_R, high_R, amount_low_R, amount_high_R = bracket
        middle_R = low_R + (high_R - low_R) // 2
        amount_R = measure(middle_R)
        open_R = open_rows(bracket)
        raise_R = open_R & (amount_R >= given_token_R)
        lower_R = open_R & (amount_R < given_token_R)
        return _Bracket(
            jnp.where(raise_R, middle_R, low_R),
            jnp.where(lower_R, middle_R, high_R),
            jnp.where(raise_R, amount_R, amount_low_R),
            jnp.where(lower_R, amount_R, amount_high_R),
        )

    return lax.while_loop(lambda b: jnp.any(open_rows(b)), halve, start).low_R


def _bits(weight: Float[Array, "..."]) -> Int32[Array, "..."]:
    return lax.bitcast_convert_type(weight, jnp.int32)


def _value(bits: Int32[Array, "..."]) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.float32)
