"""How arrays are sharded over a mesh: one table from axis letters to mesh axes.

An array's name ends in its axes (`w_qkv_UD`, `output_count_AV`), so the name decides its sharding.
Only this file writes a `PartitionSpec`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jinfer.parallel.collectives import WHOLE, Shards
from jinfer.parallel.mesh import TENSOR

# Logical axis -> mesh axis. An axis that is not listed is not sharded. Q and C are split between
# heads. In a fused axis (U, Y) each chip holds its shard of every part. Replicas, along the
# other mesh axis, have no array in common.
MESH_AXIS_OF = {
    "V": TENSOR,  # vocabulary: embeddings, logits, counts of tokens
    "W": TENSOR,  # 32-bit words of vocabulary masks
    "N": TENSOR,  # query heads
    "Q": TENSOR,
    "K": TENSOR,  # kv heads, in the pool too
    "C": TENSOR,
    "U": TENSOR,
    "Y": TENSOR,
    "F": TENSOR,  # intermediate_size
    "E": TENSOR,  # experts
}

ON_EVERY_CHIP = PartitionSpec()  # not sharded


def spec_of(axes: str) -> PartitionSpec:
    """The PartitionSpec of an array, from its axis letters, such as "LQD".

    It ends with the last sharded axis, so that equal shardings compare equal.
    """
    last = max((at for at, letter in enumerate(axes) if letter in MESH_AXIS_OF), default=-1)
    cut = axes[: last + 1]
    if cut and not cut.isalpha():
        raise ValueError(f"numbers must come after the sharded axes; got {axes=}.")
    return PartitionSpec(*map(MESH_AXIS_OF.get, cut))


def axes_of(name: str) -> str:
    """The axis letters at the end of an array's name; "" if there are none."""
    found = re.search(r"_([A-Z0-9]*[A-Z][A-Z0-9]*)$", name)
    return found[1] if found else ""


class Placement:
    """The devices of one model: shardings of its arrays, and functions that run on all shards.

    On one device nothing is sharded, and programs contain no `jax.shard_map`.
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
        """The devices of this process."""
        return [d for d in self.devices if d.process_index == jax.process_index()]

    def sharding(self, axes: str, *, memory_kind: str | None = None) -> Sharding:
        """The sharding of an array with these axes."""
        if self.is_single:
            return SingleDeviceSharding(self.devices[0], memory_kind=memory_kind)
        return NamedSharding(self.mesh, spec_of(axes), memory_kind=memory_kind)

    def placed(self, tree: Any) -> Any:
        """The shapes of a pytree's arrays, with the shardings that their field names imply."""

        def shape(path: Sequence[Any], leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = self.sharding(_axes_at(path))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(shape, tree)

    def spread(self, function: Callable[..., Any], shapes: Any, results: Any) -> Any:
        """Makes a function of whole arrays that runs `function` on every shard.

        Args:
          function: takes and returns shards; it calls the collectives of `self.shards`.
          shapes: shapes of its arguments, with their shardings.
          results: shapes of its results, for each leaf or subtree; None = not sharded, and then
            every chip must return the same value.
        """
        if self.is_single:
            return function
        # JAX cannot infer through kernels and loops that results are equal on all shards.
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
    """The axes of the array at a path, from the last name in the path."""
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
    named = [name for name in names if isinstance(name, str)]
    return axes_of(named[-1]) if named else ""
