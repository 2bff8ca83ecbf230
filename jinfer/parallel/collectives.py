"""Collectives over the tensor axis; no-ops on one device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of a model, seen from inside one of them.

    Every shard gets the same result from `sum`, `max`, `min`, `join` and `whole`.
    """

    axis: str | None = None  # mesh axis of the shards; None = the model is not sharded

    def sum(self, part: Array) -> Array:
        """The sum of all shards' parts, in the dtype of the parts."""
        return part if self.axis is None else lax.psum(part, self.axis)

    def max(self, part: Array) -> Array:
        return part if self.axis is None else lax.pmax(part, self.axis)

    def min(self, part: Array) -> Array:
        return part if self.axis is None else lax.pmin(part, self.axis)

    def join(self, part_RJ: Array) -> Array:
        """All shards' parts, concatenated along the last axis in shard order."""
        if self.axis is None:
            return part_RJ
        return lax.all_gather(part_RJ, self.axis, axis=part_RJ.ndim - 1, tiled=True)

    def whole(self, length: int) -> int:
        """Length of the whole axis, if each shard has `length` of it."""
        return length if self.axis is None else length * jax.lax.axis_size(self.axis)

    def start(self, length: int) -> Array | int:
        """Index where this shard's part of an axis begins, if each shard has `length` of it."""
        return 0 if self.axis is None else lax.axis_index(self.axis) * length

    def local(self, index: Array, length: int) -> Array:
        """Maps indices of the whole axis to indices in this shard; `length` = not in this shard."""
        if self.axis is None:
            return index
        index = index - self.start(length)
        return jnp.where((index >= 0) & (index < length), index, length)


WHOLE = Shards()
