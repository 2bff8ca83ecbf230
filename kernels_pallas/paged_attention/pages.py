"""What a pool of KV pages is: plain cells, or cells of 8 bits with a scale per key and value."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# Of a stored number: the largest one of each 8-bit dtype. float8_e4m3fn has no infinity.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
PLAIN_DTYPES = ("float32", "bfloat16", "float16")


class QuantizedPages(NamedTuple):
    """The pool in 8 bits: `cell * scale` is the key or the value.

    `scales_LPK2Z[l, p, k, 0, z]` belongs to the key of that page, head and token, and
    `[l, p, k, 1, z]` to its value, float32. Tokens stand in the last axis, as they do in a
    matrix of scores: a key's scale multiplies its column there, a value's its softmax weight.
    """

    cells_LPKZ2H: Array
    scales_LPK2Z: Float[Array, "L P K 2 Z"]


Pages = Array | QuantizedPages


def cells_of(pages: Pages) -> Array:
    """The cells `[L, P, K, Z, 2H]` of either kind of pool."""
    return pages.cells_LPKZ2H if isinstance(pages, QuantizedPages) else pages


def scales_of(pages: Pages) -> Array | None:
    """The scales `[L, P, K, 2, Z]`; None where cells are what they say."""
    return pages.scales_LPK2Z if isinstance(pages, QuantizedPages) else None


def quantize(x_TKH: Float[Array, "T K H"], dtype: Any) -> tuple[Array, Float[Array, "T K"]]:
    """Symmetric, one scale per token and head: the largest magnitude becomes the largest number.

    Args:
      x_TKH: keys or values.
      dtype: int8 or float8_e4m3fn.

    Returns:
      Numbers of that dtype and their scales, 1 where all of a head is 0. The error is at most half
      a scale for int8; for float8 (3 bits after the leading one) 1/16 of the number, or 2**-10
      of a scale where that is more, among the subnormal ones.
    """
    largest = LARGEST[jnp.dtype(dtype).name]
    x_TKH = x_TKH.astype(jnp.float32)
    peak_TK = jnp.max(jnp.abs(x_TKH), axis=-1)
    # A product, for compilers turn a division by a constant into one, and not all of them do.
    scale_TK = jnp.where(peak_TK > 0, peak_TK * jnp.float32(1 / largest), 1)
    numbers_TKH = jnp.clip(x_TKH / scale_TK[..., None], -largest, largest)
    if jnp.issubdtype(dtype, jnp.integer):
        numbers_TKH = jnp.round(numbers_TKH)
    return numbers_TKH.astype(dtype), scale_TK


def new_cells(
    k_TKH: Float[Array, "T K H"], v_TKH: Float[Array, "T K H"], pages: Pages
) -> tuple[Array, Float[Array, "T K 2"] | None]:
    """Keys and values as the pool stores them, side by side, and their scales if it has any."""
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
    """Heads padded with zeros to the width that the pool stores, which changes no score."""
    more = cells_of(pages).shape[4] // 2 - heads[0].shape[2]
    return [jnp.pad(x, ((0, 0), (0, 0), (0, more))) if more else x for x in heads]
