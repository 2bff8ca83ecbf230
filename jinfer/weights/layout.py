"""How weights lie in a device's memory, where the device's own choice costs dear.

XLA for TPU 7x multiplies by bfloat16 matrices in tiles of 16 x 128, but lays arrays out in tiles
of 8 x 128: every dispatch would begin by re-tiling all weights, into as much memory again.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jaxtyping import Array

from jinfer.weights.host_tensor import HostTensor

# EnginePlan.weight_layout -> tiles of a matrix; None = as the device does.
TILES = {"default": None, "16x128": ((16, 128), (2, 1))}

# A parameter's path in the tree and its number of axes -> where it goes.
Hold = Callable[[str, int], Format | None]


def hold_as(weight_layout: str, sharding: jax.sharding.Sharding) -> Hold:
    """Where each parameter goes under a plan's layout; None = wherever the device likes.

    The embedding stays as it is: rows are looked up in it, even where it also is the unembedding.
    """
    tiles = TILES[weight_layout]

    def hold(path: str, num_axes: int) -> Format | None:
        leaf = path.rsplit(".", 1)[-1]
        if tiles is None or not leaf.startswith(("w_", "unembed_")):
            return None
        return Format(Layout(tuple(range(num_axes)), tiles), sharding)

    return hold


def put_held(path: str, tensor: HostTensor, *, hold: Hold) -> Array:
    """Moves one parameter to its device, layer by layer if stacked.

    So the device never holds more than one layer's share in its own layout beside the parameter.
    """
    held = hold(path, len(tensor.shape))
    if held is None:
        return jax.device_put(tensor.read(), jax.devices()[0])
    if not tensor.axes.startswith("L"):
        return jax.device_put(tensor.read(), held)
    zeros = partial(jnp.zeros, tensor.shape, tensor.dtype)
    stack = jax.jit(zeros, out_shardings=held)()
    set_layer = jax.jit(put_layer, donate_argnums=0, out_shardings=held)
    rest = (slice(None),) * (len(tensor.shape) - 1)
    for layer in range(tensor.shape[0]):
        stack = set_layer(stack, tensor.read((slice(layer, layer + 1), *rest)), layer)
    return stack


def put_layer(stack: Array, part: Array, layer: Array | int) -> Array:
    """The stack with one layer, `part` with its leading axis of 1, in its place."""
    return jax.lax.dynamic_update_slice_in_dim(stack, part, layer, axis=0)
