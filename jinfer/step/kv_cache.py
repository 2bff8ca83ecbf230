"""The pool of KV pages: one array for all layers, donated at the border, updated in place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jinfer.config import ModelConfig

KVPages = Float[Array, "L P K Z _"]  # [L, P, K, Z, 2H]


def page_bytes(config: ModelConfig, *, page_size: int, dtype: str) -> int:
    """Bytes of one page: `page_size` tokens of all layers, keys and values."""
    return config.kv_bytes_per_token(jnp.dtype(dtype).itemsize) * page_size


def pages_shape(
    config: ModelConfig, *, num_pages: int, page_size: int, dtype: str
) -> jax.ShapeDtypeStruct:
    """Shape of the pool, `[L, P, K, Z, 2H]`: a token's key and value stand side by side."""
    shape = (config.num_layers, num_pages, config.num_kv_heads, page_size, 2 * config.head_width)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def allocate_pages(shape: jax.ShapeDtypeStruct) -> KVPages:
    return jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype))()
