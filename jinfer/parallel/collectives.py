"""What one shard says to the others. On a single device nothing is said, and nothing costs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of a model, seen from inside one of them.

    Every method gives every shard the same result, except `start`.
    """

    axis: str | None = None  # the mesh axis they lie along; None: the model is whole here

    def sum(self, part: Array) -> Array:
        """The sum of all shards' parts, in the dtype of the parts."""
        return part if self.axis is None else lax.psum(part, self.axis)

    def max(self, part: Array) -> Array:
        return part if self.axis is None else lax.pmax(part, self.axis)

    def min(self, part: Array) -> Array:
        return part if self.axis is None else lax.pmin(part, self.axis)

    def join(self, part_RJ: Array) -> Array:
        """All shards' parts side by side along the last axis, in the shards' order."""
        if self.axis is None:
            return part_RJ
        return lax.all_gather(part_RJ, self.axis, axis=part_RJ.ndim - 1, tiled=True)

    def whole(self, length: int) -> int:
        """Length over all shards of an axis of which each has `length`."""
        return length if self.axis is None else length * jax.lax.axis_size(self.axis)

    def start(self, length: int) -> Array | int:
        """Where this shard's part begins, on an axis of which each shard has `length`."""
        return 0 if self.axis is None else lax.axis_index(self.axis) * length

    def local(self, index: Array, length: int) -> Array:
        """Indices of a whole axis as this shard counts them; `length` = not in this shard."""
        if self.axis is None:
            return index
        index = index - self.start(length)
        return jnp.where((index >= 0) & (index < length), index, length)


WHOLE = Shards()
