"""Reads Orbax checkpoints, as written by `jinfer convert`, through TensorStore.

The subfolder `orbax` of a model folder holds jinfer's own tree without fused parameters (as from
`load_params` with `joined=False`): one array per layer and parameter, with the axes in its name.
Reading permutes nothing, and fills a stack layer by layer. Arrays are stored in chunks of a few
MiB, so a shard can be read without the rest. Any Orbax can restore the folder, and jinfer can read
a folder that Orbax saved from the same tree.

Source: Orbax documentation, "Checkpoint Format Guide"; TensorStore, drivers "ocdbt" and "zarr".
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jinfer.errors import CheckpointError
from jinfer.models.weight_map import HFTensor, WeightMap, leaf_axes
from jinfer.weights.host_tensor import Part, Piece
from jinfer.weights.safetensors import is_safetensors

ORBAX_FOLDER = "orbax"
# Chunks are not cached; their locations are.
CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "cache_pool#ocdbt": {"total_bytes_limit": 1e8}}
# Names in folders that were converted before 30 November 2026 -> names since then.
_RENAMED = {"unembed_VD": "lm_head_VD"}
DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}  # an array's metadata file -> driver


@dataclass(frozen=True, kw_only=True, slots=True)
class OrbaxArray:
    """One opened array of an Orbax checkpoint; `pieces` reads its values."""

    path: Path  # of the checkpoint
    name: str
    store: Any  # tensorstore.TensorStore

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.store.dtype.numpy_dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def num_bytes(self) -> int:
        return self.store.size * self.dtype.itemsize

    def pieces(self, sizes: Sequence[int], parts: Sequence[Part]) -> list[Piece]:
        """Splits the part into chunks; see `jinfer.weights.host_tensor.Stored`."""
        assert tuple(sizes) == self.shape, f"{self.name}: {sizes=}, {self.shape=}"
        slices = [part for part in parts if isinstance(part, slice)]
        if len(slices) < len(parts):  # repeated kv heads, several on one device: a small matrix
            picked = self.store.oindex[tuple(parts)]
            return [(tuple(map(slice, picked.shape)), partial(self._read, picked))]
        chunk = self.store.chunk_layout.read_chunk.shape
        return [
            (
                tuple(
                    slice(at.start - part.start, at.stop - part.start)
                    for at, part in zip(piece, slices, strict=True)
                ),
                partial(self._read, self.store[piece]),
            )
            for piece in itertools.product(*map(_cut, slices, chunk))
        ]

    def _read(self, source: Any) -> np.ndarray:
        try:
            return source.read().result()
        except ValueError as error:
            raise _damaged(self.path, f"{self.name}: {_reason(error)}") from None


def is_orbax(folder: Path) -> bool:
    """Whether a model folder has an Orbax checkpoint and no safetensors.

    Orbax gives a checkpoint its final name when it is complete, so partial ones do not count.
    """
    return (folder / ORBAX_FOLDER).is_dir() and not is_safetensors(folder)


def own_map(weights: WeightMap) -> WeightMap:
    """The weight map of a checkpoint of jinfer's own tree, for the same model as `weights`."""

    def own(leaf: str, name: str) -> HFTensor:
        return HFTensor(name, " ".join(leaf_axes(leaf)))

    return replace(
        weights,
        outer={leaf: own(leaf, leaf) for leaf in weights.outer},
        block={leaf: own(leaf, f"blocks.{{layer}}.{leaf}") for leaf in weights.block},
        ignored=frozenset({"lm_head_VD"} - weights.outer.keys()),  # a copy of a tied embedding
    )


def open_orbax(folder: Path) -> dict[str, OrbaxArray]:
    """Opens the arrays of a model folder's Orbax checkpoint, by name: "blocks.3.w_q_QD".

    Raises:
      CheckpointError: if the checkpoint is damaged, or a package is not installed.
    """
    ts = import_tensorstore()
    place = folder / ORBAX_FOLDER
    context = ts.Context(CONTEXT)
    base = {"driver": "file", "path": f"{place.resolve().as_posix()}/"}
    kvstore = {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#ocdbt"}
    try:
        keys = ts.KvStore.open(kvstore, context=context).result().list().result()
        opening = {}
        for key in keys:
            name, _, last = key.decode().rpartition("/")
            if last in DRIVERS:
                spec = {
                    "driver": DRIVERS[last],
                    "kvstore": {**kvstore, "path": f"{name}/"},
                    "fill_missing_data_reads": False,
                }
                opening[name] = ts.open(spec, open=True, read=True, context=context)
        stores = {name: store.result() for name, store in opening.items()}
    except ValueError as error:  # undecodable keys included
        raise _damaged(place, _reason(error)) from None
    if not stores:
        raise _damaged(place, "it has no arrays")
    return {
        _RENAMED[name] if name in _RENAMED else name: OrbaxArray(path=place, name=name, store=store)
        for name, store in stores.items()
    }


def import_tensorstore() -> Any:
    """Imports `tensorstore`, which is installed with Orbax."""
    try:
        import tensorstore  # imported here: most checkpoints do not need it
    except ModuleNotFoundError as error:
        raise not_installed(error) from None
    return tensorstore


def not_installed(error: ModuleNotFoundError) -> CheckpointError:
    """The error for a missing Orbax package."""
    return CheckpointError(
        f"an Orbax checkpoint needs the packages of Orbax; got no module {error.name!r}. "
        "Install them: pip install 'jinfer[orbax]'."
    )


def _cut(part: slice, step: int) -> list[slice]:
    """Splits a part of an axis at the multiples of `step`."""
    cuts = range((part.start // step + 1) * step, part.stop, step)
    edges = [part.start, *cuts, part.stop]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges) if start < stop]


def _reason(error: ValueError) -> str:
    """TensorStore's message, without the spec that it adds in brackets."""
    return str(error).split(" [", 1)[0].splitlines()[0]


def _damaged(place: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{place} must be a whole Orbax checkpoint; got {what}. Run `jinfer convert` again."
    )
