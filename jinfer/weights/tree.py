"""The parameter tree: a plain nested dict; the names of its leaves end in their axes.

"embed_VD", "final_norm_D", "lm_head_VD" unless tied, and "blocks": a list of one dict per layer
if the layer loop is unrolled, or one dict of arrays with a leading L axis if it is scanned. A
fused parameter (`JOINED`) is one leaf.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from jinfer.models.weight_map import JOINED, HFTensor, WeightMap, at_layer, leaf_axes

Params = dict[str, Any]

FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One leaf of the tree, and its stored tensors."""

    path: str  # "embed_VD", "blocks.3.w_q_QD" or, stacked, "blocks.w_q_QD"
    axes: str  # one letter per axis, with a leading L if stacked
    shape: tuple[int, ...]  # padded
    tensors: tuple[HFTensor, ...] = ()  # one, or one per layer if stacked; none if fused
    parts: tuple["Place", ...] = ()  # leaves of the stored tree, if fused

    @property
    def leaf(self) -> str:
        """The last word of the path."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def num_stacked(self) -> int:
        """Number of axes before the leaf's own: 1 if stacked, else 0."""
        return len(self.axes) - len(leaf_axes(self.leaf))

    def shape_in(self, weights: WeightMap) -> tuple[int, ...]:
        """Its shape in another weight map of the same model, such as the checkpoint's."""
        return (*self.shape[: self.num_stacked], *weights.shape(self.leaf))


def build_tree(
    weights: WeightMap,
    num_layers: int,
    layer_loop: str,
    make: Callable[[Place], Any],
    *,
    joined: bool = True,
) -> Params:
    """Builds the parameter tree by calling `make(place)` for every leaf, in a fixed order.

    Args:
      weights: of the padded model.
      num_layers: number of blocks.
      layer_loop: "unrolled" or "scan".
      make: returns the leaf of a place.
      joined: True = for the decoder, with the fused parameters of JOINED; False = as stored.
    """

    def one(path: str, leaf: str, tensor: HFTensor) -> Place:
        return Place(path=path, axes=leaf_axes(leaf), shape=weights.shape(leaf), tensors=(tensor,))

    def in_layer(layer: int, leaf: str, tensor: HFTensor) -> Place:
        return one(f"blocks.{layer}.{leaf}", leaf, at_layer(tensor, layer))

    def stacked(leaf: str, tensor: HFTensor) -> Place:
        return Place(
            path=f"blocks.{leaf}",
            axes="L" + leaf_axes(leaf),
            shape=(num_layers, *weights.shape(leaf)),
            tensors=tuple(at_layer(tensor, layer) for layer in range(num_layers)),
        )

    def block(place_of: Callable[[str, HFTensor], Place]) -> Params:
        places = {leaf: place_of(leaf, tensor) for leaf, tensor in weights.block.items()}
        return {place.leaf: make(place) for place in (_join(places) if joined else places).values()}

    if layer_loop not in ("scan", "unrolled"):
        raise ValueError(f"layer_loop must be 'scan' or 'unrolled'; got {layer_loop=}. Choose one.")
    params: Params = {leaf: make(one(leaf, leaf, tensor)) for leaf, tensor in weights.outer.items()}
    if layer_loop == "scan":
        params["blocks"] = block(stacked)
    else:
        params["blocks"] = [block(partial(in_layer, layer)) for layer in range(num_layers)]
    return params


def _join(places: Mapping[str, Place]) -> dict[str, Place]:
    """Replaces the parts of each fused parameter by one place, where the first part was."""
    parts_of: dict[str, tuple[Place, ...]] = {}
    for name, place in places.items():
        leaf = next((leaf for leaf, names in JOINED.items() if name in names), name)
        parts_of[leaf] = (*parts_of.get(leaf, ()), place)
    return {leaf: _whole(leaf, parts) for leaf, parts in parts_of.items()}


def _whole(leaf: str, parts: tuple[Place, ...]) -> Place:
    first = parts[0]
    if leaf not in JOINED:
        return first
    assert tuple(part.leaf for part in parts) == JOINED[leaf], f"{leaf} of {parts=}"
    axis = first.num_stacked
    length = sum(part.shape[axis] for part in parts)
    return Place(
        path=first.path.removesuffix(first.leaf) + leaf,
        axes=first.axes[:axis] + leaf_axes(leaf),
        shape=(*first.shape[:axis], length, *first.shape[axis + 1 :]),
        parts=parts,
    )


def require_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of a name, which must be in FLOAT_DTYPES."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {dtype=}. Choose one."
        )
    return FLOAT_DTYPES[dtype]
