"""Random parameters made on the device, so that a benchmark needs no checkpoint."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format
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
    padded: ModelConfig | None = None,
    hold: Hold | None = None,
) -> Params:
    """Makes the tree that `load_params` would return, without a file or a copy on the host.

    Norms are one and biases zero. Matrices are uniform with standard deviation 1/sqrt(inputs), so
    that logits stay finite through any number of layers. One program is compiled per distinct
    shape. The same seed gives the same numbers on every kind of device.

    Args:
      config: of any model; `load_format="dummy"` reads it from config.json.
      dtype: "float32", "bfloat16" or "float16".
      layer_loop: "unrolled" or "scan".
      seed: one for all parameters; different leaves and layers get different numbers.
      padded: the padded model, `jinfer.parallel.model_shards.padded_model`; None = not padded.
      hold: sharding of each parameter, from `jinfer.weights.layout.hold_as`; None = default device.
    """
    weights = FAMILIES[config.family].weight_map(config)
    jax_dtype = jnp.dtype(require_dtype(dtype))
    number = itertools.count(1)

    def make(place: Place) -> jax.Array:
        parts = place.parts or (place,)
        numbers = tuple(next(number) for _ in parts)
        where: Any = hold and hold(place.path, place.axes)
        if "norm" in place.leaf:
            return jnp.ones(place.shape, jax_dtype, device=where)
        if place.leaf.startswith("b_"):
            return jnp.zeros(place.shape, jax_dtype, device=where)
        fan_in = weights.stored_shape(parts[0].tensors[0])[-1]
        # Computed directly in its final sharding.
        draw = jax.jit(
            _uniform,
            static_argnames=("parts", "num_shards", "head_dim", "dtype"),
            out_shardings=where,
        )
        return draw(
            seed,
            numbers,
            fan_in**-0.5,
            parts=tuple(_Part(each.axes, each.shape, each.shape_in(weights)) for each in parts),
            num_shards=_num_shards(where, place),
            head_dim=config.head_dim,
            dtype=jax_dtype,
        )

    padded_weights = FAMILIES[config.family].weight_map(padded or config)
    return build_tree(padded_weights, config.num_layers, layer_loop, make)


class _Part(NamedTuple):
    """A parameter, or one part of a fused parameter."""

    axes: str
    shape: tuple[int, ...]  # padded
    stored_shape: tuple[int, ...]


def _num_shards(where: Any, place: Place) -> int:
    """Number of shards of the axis along which a fused parameter's parts are concatenated."""
    sharding = where.sharding if isinstance(where, Format) else where
    if sharding is None:
        return 1
    axis = place.num_stacked
    return place.shape[axis] // sharding.shard_shape(place.shape)[axis]


def _uniform(
    seed: int | Array,
    numbers: Sequence[int | Array],
    deviation: float | Array,
    *,
    parts: tuple[_Part, ...],
    num_shards: int,
    head_dim: int,
    dtype: jnp.dtype,
) -> Array:
    """Hashes each element's index: unlike jax.random, one fused pass with no temporaries.

    On the CPU, threefry needs eight times the memory of a bfloat16 result, and four times the
    compile time. The index is that in the stored tensor, so every mesh gets the same model.

    Args:
      seed: of the model.
      numbers: one per part, unique in the model.
      deviation: standard deviation of every element.
      parts: one, or all parts of a fused parameter.
      num_shards: number of shards of the concatenated axis.
      head_dim: H.
      dtype: dtype of the result.
    """
    axis = len(parts[0].axes) - len(parts[0].axes.removeprefix("L"))
    lengths = [part.shape[axis] // num_shards for part in parts]  # in one shard
    shape = (*parts[0].shape[:axis], sum(lengths) * num_shards, *parts[0].shape[axis + 1 :])
    index = [lax.broadcasted_iota(jnp.uint32, shape, each) for each in range(len(shape))]
    shard, within = index[axis] // sum(lengths), index[axis] % sum(lengths)
    bits, start = jnp.uint32(0), 0
    for number, part, length in zip(numbers, parts, lengths, strict=True):
        index[axis] = shard * length + within - start
        salt = _mix(jnp.uint32(seed) + _mix(jnp.uint32(number)))
        part_bits = _mix(_place(index, part, head_dim) ^ salt)
        bits = jnp.where(within < start, bits, part_bits)
        start += length
    unit = bits.astype(jnp.int32).astype(jnp.float32) * 2.0**-31  # -1 to 1, deviation 3**-0.5
    return (unit * (3.0**0.5 * deviation)).astype(dtype)


def _place(index: Sequence[Array], part: _Part, head_dim: int) -> Array:
    """Each element's flat index in the stored part; repeated kv heads get equal indices."""
    place = jnp.uint32(0)
    for axis, letter in enumerate(part.axes):
        along = index[axis]
        if letter in "KC" and part.shape[axis] > part.stored_shape[axis]:
            num_repeats = part.shape[axis] // part.stored_shape[axis]
            along = repeated(along, letter, num_repeats, head_dim)
        place = place + along * jnp.uint32(math.prod(part.stored_shape[axis + 1 :]) % 2**32)
    return place


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of 32-bit words that flips every output bit with probability near a half.

    Source: Wellons, hash-prospector, "lowbias32".
    """
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
