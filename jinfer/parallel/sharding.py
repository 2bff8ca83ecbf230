"""How arrays lie on a mesh: the one table, and what follows from the names of arrays.

An array's name ends in its axes (`w_qkv_UD`, `output_count_AV`), so a name says where its array
goes: each letter is looked up here, and nowhere else is a `PartitionSpec` written.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jinfer.parallel.collectives import WHOLE, Shards
from jinfer.parallel.mesh import TENSOR

# Logical axis -> mesh axis; what is not named here is whole on every chip. Heads side by side
# (Q, C) are cut between heads, and what is joined (U, Y) chip by chip. Replicas (the mesh's other
# axis) share no array.
MESH_AXIS_OF = {
    "V": TENSOR,  # vocabulary: embeddings, logits, counts of tokens
    "W": TENSOR,  # 32-bit words of vocabulary masks
    "N": TENSOR,  # query heads
    "Q": TENSOR,
    "K": TENSOR,  # kv heads, those of the pool included
    "C": TENSOR,
    "U": TENSOR,
    "Y": TENSOR,
    "F": TENSOR,  # feed-forward width
    "E": TENSOR,  # experts
}

ON_EVERY_CHIP = PartitionSpec()  # of arrays that lie whole on each


def spec_of(axes: str) -> PartitionSpec:
    """Which mesh axis each axis of an array is cut over, from its letters, such as "LQD".

    It ends with the last axis that is cut, so that equal placements compare equal.
    """
    last = max((at for at, letter in enumerate(axes) if letter in MESH_AXIS_OF), default=-1)
    cut = axes[: last + 1]
    if cut and not cut.isalpha():
        raise ValueError(f"numbers stand behind the axes that are cut; got {axes=}.")
    return PartitionSpec(*map(MESH_AXIS_OF.get, cut))


def axes_of(name: str) -> str:
    """The letters that end an array's name; none if it has no such end."""
    found = re.search(r"_([A-Z0-9]*[A-Z][A-Z0-9]*)$", name)
    return found[1] if found else ""


class Placement:
    """Where one model's arrays go, and how its functions are run there: one chip or a mesh.

    On one device everything is whole, and nothing of `jax.shard_map` remains in a program.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.is_single = mesh.size == 1
        self.shards = WHOLE if self.is_single else Shards(TENSOR)

    @property
    def devices(self) -> list[jax.Device]:
        return list(self.mesh.devices.flat)

    @property
    def local_devices(self) -> list[jax.Device]:
        """Those of this process."""
        return [d for d in self.devices if d.process_index == jax.process_index()]

    def sharding(self, axes: str, *, memory_kind: str | None = None) -> Sharding:
        """Of an array with these axes."""
        if self.is_single:
            return SingleDeviceSharding(self.devices[0], memory_kind=memory_kind)
        return NamedSharding(self.mesh, spec_of(axes), memory_kind=memory_kind)

    def placed(self, tree: Any) -> Any:
        """The shapes of a pytree's arrays, with the place that the names of its fields tell."""

        def shape(path: Sequence[Any], leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = self.sharding(_axes_at(path))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(shape, tree)

    def spread(self, function: Callable[..., Any], shapes: Any, results: Any) -> Any:
        """The function of whole arrays that runs `function` on every shard.

        Args:
          function: takes and returns shards; it says what it exchanges by `self.shards`.
          shapes: of its arguments, with their places.
          results: of what it returns, or of the same subtrees; None = whole on every chip, where
            it must be the same.
        """
        if self.is_single:
            return function
        # Whether results are equal on all shards cannot be inferred through kernels and loops.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=_specs(shapes),
            out_specs=_specs(results),
            check_vma=False,
        )


def _specs(tree: Any) -> Any:
    def spec(leaf: jax.ShapeDtypeStruct | None) -> PartitionSpec:
        return ON_EVERY_CHIP if leaf is None else leaf.sharding.spec

    return jax.tree.map(spec, tree, is_leaf=lambda leaf: leaf is None)


def _axes_at(path: Sequence[Any]) -> str:
    """The axes of the array at a path, from the last name on it."""
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
    named = [name for name in names if isinstance(name, str)]
    return axes_of(named[-1]) if named else ""
