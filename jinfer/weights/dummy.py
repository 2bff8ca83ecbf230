"""Random parameters of any shape, made on the device: a benchmark needs no checkpoint."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jinfer.config import ModelConfig
from jinfer.models.registry import FAMILIES
from jinfer.weights.host_tensor import repeated
from jinfer.weights.layout import Hold
from jinfer.weights.tree import Params, Place, build_tree, require_dtype


def dummy_params(
    config: ModelConfig,
    *,
    dtype: str,
    layer_loop: str,
    seed: int,
    held: ModelConfig | None = None,
    hold: Hold | None = None,
) -> Params:
    """Draws the tree that `load_params` would give, without a file or a copy on the host.

    Norms are one, biases zero and matrices uniform with a deviation of one over the root of their
    inputs, so that logits stay finite through any number of layers. One program is compiled per
    distinct shape. The same seed gives the same numbers on every kind of device.

    Args:
      config: any model's; `load_format="dummy"` reads it from config.json.
      dtype: "float32", "bfloat16" or "float16".
      layer_loop: "unrolled" or "scan".
      seed: of every parameter; different leaves and layers get different numbers.
      held: the model as it is cut, `jinfer.parallel.shares.held_model`; None = as it is.
      hold: where each parameter goes, as `jinfer.weights.layout.hold_as` says; None = anywhere.
    """
    weights = FAMILIES[config.family].weight_map(config)
    jax_dtype = jnp.dtype(require_dtype(dtype))
    num_made = 0

    def make(place: Place) -> jax.Array:
        nonlocal num_made
        num_made += 1
        where: Any = hold and hold(place.path, place.axes)
        if "norm" in place.leaf:
            return jnp.ones(place.shape, jax_dtype, device=where)
        if place.leaf.startswith("b_"):
            return jnp.zeros(place.shape, jax_dtype, device=where)
        fan_in = weights.stored_shape(place.tensors[0])[-1]
        # Drawn where it shall lie.
        draw = jax.jit(
            _uniform,
            static_argnames=("axes", "shape", "stored_shape", "head_width", "dtype"),
            out_shardings=where,
        )
        return draw(
            seed,
            num_made,
            fan_in**-0.5,
            axes=place.axes,
            shape=place.shape,
            stored_shape=place.shape_in(weights),
            head_width=config.head_width,
            dtype=jax_dtype,
        )

    held_weights = FAMILIES[config.family].weight_map(held or config)
    return build_tree(held_weights, config.num_layers, layer_loop, make)


def _uniform(
    seed: int | Array,
    leaf_number: int | Array,
    deviation: float | Array,
    *,
    axes: str,
    shape: tuple[int, ...],
    stored_shape: tuple[int, ...],
    head_width: int,
    dtype: jnp.dtype,
) -> Array:
    """Hashes each element's place: unlike jax.random, one fused pass with no temporaries.

    Threefry takes eight times the room of a bfloat16 result on the CPU, and compiles four times
    as long. The place is that in the model as stored, so that every mesh draws the same model.
    """
    place = jnp.uint32(0)
    for axis, letter in enumerate(axes):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis)
        if letter in "KC" and shape[axis] > stored_shape[axis]:
            index = repeated(index, letter, shape[axis] // stored_shape[axis], head_width)
        stride = math.prod(stored_shape[axis + 1 :])
        place = place + index * jnp.uint32(stride % 2**32)
    bits = _mix(place ^ _mix(jnp.uint32(seed) + _mix(jnp.uint32(leaf_number))))
    unit = bits.astype(jnp.int32).astype(jnp.float32) * 2.0**-31  # -1 to 1, deviation 3**-0.5
    return (unit * (3.0**0.5 * deviation)).astype(dtype)


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of 32-bit words that flips every output bit with probability near a half.

    Source: Wellons, hash-prospector, "lowbias32".
    """
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
