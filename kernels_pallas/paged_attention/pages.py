"""Pools of KV pages: plain cells, or 8-bit cells with a scale per key and value."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# The largest number of each 8-bit dtype. float8_e4m3fn has no infinity.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
PLAIN_DTYPES = ("float32", "bfloat16", "float16")


class QuantizedPages(NamedTuple):
    """The pool in 8 bits: `cell * scale` is the key or the value.

    `scales_LPK2Z[l, p, k, 0, z]`, float32, is the scale of that token's key, and
    `[l, p, k, 1, z]` that of its value. Tokens are the last axis, as in a matrix of scores: a
    key's scale multiplies its column of scores, a value's scale its column of softmax weights.
    """

    cells_LPKZ2H: Array
    scales_LPK2Z: Float[Array, "L P K 2 Z"]


Pages = Array | QuantizedPages


def cells_of(pages: Pages) -> Array:
    """The cells `[L, P, K, Z, 2H]` of either kind of pool."""
    return pages.cells_LPKZ2H if isinstance(pages, QuantizedPages) else pages


def scales_of(pages: Pages) -> Array | None:
    """The scales `[L, P, K, 2, Z]`; None for plain cells."""
    return pages.scales_LPK2Z if isinstance(pages, QuantizedPages) else None


def quantize(x_TKH: Float[Array, "T K H"], dtype: Any) -> tuple[Array, Float[Array, "T K"]]:
    """Scales each token and head symmetrically: its largest magnitude becomes the dtype's largest.

    Args:
      x_TKH: keys or values.
      dtype: int8 or float8_e4m3fn.

    Returns:
      Numbers of that dtype and their scales; a head of zeros has scale 1. The error is at most half
      a scale for int8. For float8 (3 bits after the leading one) it is at most 1/16 of the number,
      or 2**-10 of a scale for subnormal numbers, where that is more.
    """
    largest = LARGEST[jnp.dtype(dtype).name]
    x_TKH = x_TKH.astype(jnp.float32)
    peak_TK = jnp.max(jnp.abs(x_TKH), axis=-1)
    # A product, because only some compilers turn a division by a constant into one.
    scale_TK = jnp.where(peak_TK > 0, peak_TK * jnp.float32(1 / largest), 1)
    numbers_TKH = jnp.clip(x_TKH / scale_TK[..., None], -largest, largest)
    if jnp.issubdtype(dtype, jnp.integer):
        numbers_TKH = jnp.round(numbers_TKH)
    return numbers_TKH.astype(dtype), scale_TK


def new_cells(
    k_TKH: Float[Array, "T K H"], v_TKH: Float[Array, "T K H"], pages: Pages
) -> tuple[Array, Float[Array, "T K 2"] | None]:
    """Keys and values in the pool's form, side by side, and their scales, if any."""
    dtype = cells_of(pages).dtype
    if not isinstance(pages, QuantizedPages):
        return jnp.concatenate([k_TKH, v_TKH], axis=-1).astype(dtype), None
    (key_TKH, key_scale_TK), (value_TKH, value_scale_TK) = (
        quantize(k_TKH, dtype),
        quantize(v_TKH, dtype),
    )
    scales_TK2 = jnp.stack([key_scale_TK, value_scale_TK], axis=-1)
    return jnp.concatenate([key_TKH, value_TKH], axis=-1), scales_TK2


def widened(pages: Pages, *heads: Float[Array, "T _ H"]) -> list[Array]:
    """Heads padded with zeros to the pool's head_dim, which changes no score."""
    more = cells_of(pages).shape[4] // 2 - heads[0].shape[2]
    return [jnp.pad(x, ((0, 0), (0, 0), (0, more))) if more else x for x in heads]
