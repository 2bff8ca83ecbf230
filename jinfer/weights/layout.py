"""Puts weights on devices, in a memory layout that avoids re-tiling.

XLA for TPU 7x multiplies bfloat16 matrices in tiles of 16 x 128, but stores arrays in tiles of
8 x 128 by default. Then every dispatch re-tiles all weights first, which doubles their memory.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding
from jaxtyping import Array

from jinfer.weights.host_tensor import HostTensor, JoinedTensor

# EnginePlan.weight_layout -> tiles of a matrix; None = the device's default.
TILES = {"default": None, "16x128": ((16, 128), (2, 1))}

# A parameter's path in the tree and its axes, such as "blocks.w_o_DQ" and "LDQ" -> its placement.
Hold = Callable[[str, str], Sharding | Format]


def hold_as(weight_layout: str, sharding_of: Callable[[str], Sharding]) -> Hold:
    """Returns the function that gives each parameter's sharding, and its layout if not the default.

    The embedding keeps the default layout for row lookups, even if it is also the lm_head.

    Args:
      weight_layout: a key of TILES.
      sharding_of: axes -> the sharding of an array with these axes.
    """
    tiles = TILES[weight_layout]

    def hold(path: str, axes: str) -> Sharding | Format:
        leaf = path.rsplit(".", 1)[-1]
        sharding = sharding_of(axes)
        if tiles is None or not leaf.startswith(("w_", "lm_head_")):
            return sharding
        return Format(Layout(tuple(range(len(axes))), tiles), sharding)

    return hold


def put_held(path: str, tensor: HostTensor | JoinedTensor, *, hold: Hold) -> Array:
    """Moves one parameter to its devices, each shard directly from the file.

    On CPU the array uses the host buffer without a copy. With a non-default layout, a stack is
    moved layer by layer, so that the device holds at most one layer twice.
    """
    held = hold(path, tensor.axes)
    if not isinstance(held, Format):
        return put_shards(tensor, held)
    assert held.sharding is not None, f"a layout without a place: {path=}"
    if not tensor.axes.startswith("L"):
        return jax.device_put(put_shards(tensor, held.sharding), held)
    zeros = partial(jnp.zeros, tensor.shape, tensor.dtype)
    stack = jax.jit(zeros, out_shardings=held)()
    set_layer = jax.jit(put_layer, donate_argnums=0, out_shardings=held)
    for layer in range(tensor.shape[0]):
        stack = set_layer(stack, put_shards(tensor, held.sharding, layer=layer), layer)
    return stack


def put_shards(
    tensor: HostTensor | JoinedTensor, sharding: Sharding, *, layer: int | None = None
) -> Array:
    """Puts one parameter on its devices, or one layer of a stack, with a leading axis of 1.

    The host holds one shard at a time: it reads the next one after the transfer has finished.
    """
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    shape = tensor.shape if layer is None else (1, *tensor.shape[1:])
    shards = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None, f"a device without a shard: {sharding}"
        parts = tensor.read(index if layer is None else (layers, *index[1:]))
        shards.append(jax.block_until_ready(jax.device_put(parts, device)))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def put_layer(stack: Array, part: Array, layer: Array | int) -> Array:
    """Writes one layer into the stack; `part` has a leading axis of 1."""
    return jax.lax.dynamic_update_slice_in_dim(stack, part, layer, axis=0)
