"""The parameter tree: a plain nested dict whose leaves end in their axes.

"embed_VD", "final_norm_D", "unembed_VD" unless tied, and "blocks": a list of one dict per layer
when the layer loop is unrolled, one dict of arrays with a leading L axis when it is scanned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jinfer.models.weight_map import HFTensor, WeightMap, at_layer, leaf_axes

Params = dict[str, Any]

FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One leaf of the tree and what is stored for it."""

    path: str  # "embed_VD", "blocks.3.w_q_QD" or, stacked, "blocks.w_q_QD"
    axes: str  # one letter per axis, with a leading L if stacked
    shape: tuple[int, ...]  # as it is held
    tensors: tuple[HFTensor, ...]  # one, or one per layer if stacked

    @property
    def leaf(self) -> str:
        """The last word of the path."""
        return self.path.rsplit(".", 1)[-1]

    def shape_in(self, weights: WeightMap) -> tuple[int, ...]:
        """Its shape under another map of the same model, such as the checkpoint's own."""
        return (
            *self.shape[: len(self.axes) - len(leaf_axes(self.leaf))],
            *weights.shape(self.leaf),
        )


def build_tree(
    weights: WeightMap,
    num_layers: int,
    layer_loop: str,
    make: Callable[[Place], Any],
) -> Params:
    """The parameter tree with `make(place)` at every place, in a fixed order."""

    def one(path: str, leaf: str, tensor: HFTensor) -> Any:
        place = Place(path=path, axes=leaf_axes(leaf), shape=weights.shape(leaf), tensors=(tensor,))
        return make(place)

    def stacked(leaf: str, tensor: HFTensor) -> Any:
        place = Place(
            path=f"blocks.{leaf}",
            axes="L" + leaf_axes(leaf),
            shape=(num_layers, *weights.shape(leaf)),
            tensors=tuple(at_layer(tensor, layer) for layer in range(num_layers)),
        )
        return make(place)

    def block(layer: int) -> Params:
        return {
            leaf: one(f"blocks.{layer}.{leaf}", leaf, at_layer(tensor, layer))
            for leaf, tensor in weights.block.items()
        }

    if layer_loop not in ("scan", "unrolled"):
        raise ValueError(f"layer_loop must be 'scan' or 'unrolled'; got {layer_loop=}. Choose one.")
    params: Params = {leaf: one(leaf, leaf, tensor) for leaf, tensor in weights.outer.items()}
    if layer_loop == "scan":
        params["blocks"] = {leaf: stacked(leaf, tensor) for leaf, tensor in weights.block.items()}
    else:
        params["blocks"] = [block(layer) for layer in range(num_layers)]
    return params


def require_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of a name that parameters may have."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {dtype=}. Choose one."
        )
    return FLOAT_DTYPES[dtype]
