"""The pool of KV pages: one for all layers, donated to each program, updated in place."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jinfer.config import ModelConfig
from kernels_pallas.paged_attention.pages import LARGEST, Pages, QuantizedPages

KVPages = Pages


def pages_shape(
    config: ModelConfig,
    *,
    num_pages: int,
    page_size: int,
    dtype: str,
    head_dim: int,
    sharding: Sharding | None = None,
) -> Any:
    """The pool as shapes: cells `[L, P, K, Z, 2H]`, a token's key and value side by side.

    Args:
      config: of the model, as padded on the devices.
      num_pages: pages, null page included.
      page_size: tokens per page.
      dtype: of the cells; 8-bit cells have a scale per key and per value.
      head_dim: as stored, possibly larger than the model's.
      sharding: of all parts of the pool, whose first axes are the same, "LPK".
    """
    shaped: Any = partial(jax.ShapeDtypeStruct, sharding=sharding)
    per_head = (config.num_layers, num_pages, config.num_kv_heads)
    cells = shaped((*per_head, page_size, 2 * head_dim), jnp.dtype(dtype))
    scales = shaped((*per_head, 2, page_size), jnp.float32)
    return QuantizedPages(cells, scales) if dtype in LARGEST else cells


def page_bytes(config: ModelConfig, *, page_size: int, dtype: str, head_dim: int) -> int:
    """Bytes of one page: `page_size` tokens of all layers, keys and values, and their scales."""
    page = pages_shape(config, num_pages=1, page_size=page_size, dtype=dtype, head_dim=head_dim)
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(page))


def allocate_pages(shape: Any) -> KVPages:
    """Allocates a pool of zeros with these shapes and shardings."""

    def zeros() -> Any:
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shape)

    return jax.jit(zeros, out_shardings=jax.tree.map(lambda part: part.sharding, shape))()
