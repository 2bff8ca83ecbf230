"""Writing parameters with Orbax, one after the other.

Orbax's own handlers are given every array at once; this one is given descriptions and reads each
array when its turn comes. Apart from this module nothing imports Orbax.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jinfer.weights.host_tensor import HostTensor
from jinfer.weights.tree import Params

# Of an array's chunk, which is what can be read by itself: small enough for shards of an eighth
# of a matrix, large enough that a disk does not feel it.
CHUNK_BYTES = 2 * 1024 * 1024


def save_tree(tree: Params, place: Path, *, on_saved: Callable[[str], object]) -> None:
    """Writes a tree of HostTensors as one Orbax checkpoint of numpy arrays.

    Args:
      tree: as `build_tree` makes it for unrolled layers.
      place: an absolute path; it is there when everything is written, and not before.
      on_saved: is given each parameter's name once it is on the disk.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (HostTensor, _HostTensorHandler(on_saved)),
        # Asked for by Orbax, which warns where there is none.
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    # Weights are noise to a compressor: 20 to 30 % less to read, many times as long to unpack.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    chunked = jax.tree.map(lambda tensor: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(place, args=ocp.args.PyTreeSave(tree, save_args=chunked))


class _HostTensorHandler(ocp.type_handlers.NumpyHandler):
    """Saves what a HostTensor describes, as a numpy array to whoever restores it."""

    def __init__(self, on_saved: Callable[[str], object]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._on_saved = on_saved

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        assert args is not None and len(args) == len(values), f"{len(values)=}, {args=}"
        for tensor, info, arg in zip(values, infos, args, strict=True):
            for writing in await super().serialize([tensor.read()], [info], [arg]):
                writing.result()
            self._on_saved(info.name)
        return []  # nothing is left to wait for
