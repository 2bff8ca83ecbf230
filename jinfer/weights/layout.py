"""How weights lie in a device's memory, where the device's own choice costs dear.

XLA for TPU 7x multiplies by bfloat16 matrices in tiles of 16 x 128, but lays arrays out in tiles
of 8 x 128: every dispatch would begin by re-tiling all weights, into as much memory again.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding
from jaxtyping import Array

from jinfer.weights.host_tensor import HostTensor, JoinedTensor

# EnginePlan.weight_layout -> tiles of a matrix; None = as the device does.
TILES = {"default": None, "16x128": ((16, 128), (2, 1))}

# A parameter's path in the tree and its axes, such as "blocks.w_o_DQ" and "LDQ" -> where it goes.
Hold = Callable[[str, str], Sharding | Format]


def hold_as(weight_layout: str, sharding_of: Callable[[str], Sharding]) -> Hold:
    """Where each parameter goes under a plan's layout.

    The embedding stays as it is: rows are looked up in it, even where it also is the unembedding.

    Args:
      weight_layout: a key of TILES.
      sharding_of: axes -> where an array with these lies.
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
    """Moves one parameter to its devices, every shard straight from the file.

    On CPU the buffer read becomes the array. In a layout that is not the device's own, a stack
    goes layer by layer, so that the device never holds more than one of them twice.
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
    """One parameter on its devices, or one layer of a stack with a leading axis of 1.

    The host holds one shard at a time: each is read when the one before has left.
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
    """The stack with one layer, `part` with its leading axis of 1, in its place."""
    return jax.lax.dynamic_update_slice_in_dim(stack, part, layer, axis=0)
