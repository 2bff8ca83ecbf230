"""Which tensor of a Hugging Face checkpoint each parameter comes from, with its axes.

A parameter's name ends in its axes (`w_o_DQ`). It maps to the stored tensor's name and stored
axes, one group of letters per stored axis: "Q D" is a matrix of Q rows and D columns, "NH" a
vector of N*H numbers. To load it: split each group into its letters, then permute the letters.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jinfer.config import ModelConfig

# Fused parameters: each is its parts concatenated along axis 0. Each chip's shard is the
# concatenation of its shards of the parts, in the same order.
JOINED = {
    "w_qkv_UD": ("w_q_QD", "w_k_CD", "w_v_CD"),
    "w_gate_up_YD": ("w_gate_FD", "w_up_FD"),
}


class HFTensor(NamedTuple):
    """One stored tensor; in a block's map, the name contains `{layer}`."""

    name: str
    axes: str  # as stored, e.g. "NH D"

    @property
    def groups(self) -> list[str]:
        """The axis letters of each stored axis."""
        return self.axes.split()


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMap:
    """Every parameter of a family: leaf name to stored tensor."""

    outer: Mapping[str, HFTensor]  # outside the blocks
    block: Mapping[str, HFTensor]  # of one layer
    axis_sizes: Mapping[str, int]  # of every letter used
    ignored: frozenset[str] = frozenset()  # stored tensors that jinfer does not use

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Shape of one parameter, without a layer axis."""
        return tuple(self.axis_sizes[letter] for letter in leaf_axes(leaf))

    def stored_shape(self, tensor: HFTensor) -> tuple[int, ...]:
        """Shape the tensor must have in the file."""
        return tuple(
            math.prod(self.axis_sizes[letter] for letter in group) for group in tensor.groups
        )

    def stored_tensors(self, num_layers: int) -> Iterator[HFTensor]:
        """Every tensor that the checkpoint must contain, with layer numbers in the names."""
        yield from self.outer.values()
        for layer in range(num_layers):
            for tensor in self.block.values():
                yield at_layer(tensor, layer)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each axis letter in this model."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_q_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "Q": config.num_q_heads * config.head_dim,
        "C": config.num_kv_heads * config.head_dim,
    }


def leaf_axes(leaf: str) -> str:
    """The axis letters at the end of a parameter's name."""
    return leaf.rsplit("_", 1)[-1]


def at_layer(tensor: HFTensor, layer: int) -> HFTensor:
    """A block's tensor with its layer number in the name."""
    return tensor._replace(name=tensor.name.format(layer=layer))
