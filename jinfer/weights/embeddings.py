"""Decides from the stored tensors whether a model's embedding is also its lm_head.

`tie_word_embeddings` of config.json may contradict the files. As in transformers 5, the files
decide: two different matrices are both used, and one matrix alone may have either name.
"""

from collections.abc import Mapping

import numpy as np

from jinfer.models.weight_map import WeightMap
from jinfer.weights.host_tensor import HostTensor, Stored

BLOCK_BYTES = 64 * 1024 * 1024  # of each matrix, compared at once


def holds_two(stored: Mapping[str, Stored], untied: WeightMap) -> bool:
    """Whether the files hold an lm_head whose numbers are not those of the embedding.

    Args:
      stored: the tensors of a model whose config.json says that they are one.
      untied: the weight map of the same model with an lm_head of its own.

    Cost: reads both matrices, up to the first difference.
    """
    embed, lm_head = (stored.get(untied.outer[leaf].name) for leaf in ("embed_VD", "lm_head_VD"))
    if embed is None or lm_head is None:
        return False
    if embed.shape != lm_head.shape or len(embed.shape) != 2:
        return True
    num_rows = max(1, BLOCK_BYTES * embed.shape[0] // max(1, embed.num_bytes))
    blocks = (slice(row, row + num_rows) for row in range(0, embed.shape[0], num_rows))
    return any(not _are_equal(_rows(embed, block), _rows(lm_head, block)) for block in blocks)


def named_as_embedding(stored: Mapping[str, Stored], untied: WeightMap) -> Mapping[str, Stored]:
    """The tensors of a tied model; the embedding gets its own name if it has the lm_head's."""
    embed, lm_head = untied.outer["embed_VD"].name, untied.outer["lm_head_VD"].name
    if embed in stored or lm_head not in stored:
        return stored
    return {embed if name == lm_head else name: tensor for name, tensor in stored.items()}


def _rows(tensor: Stored, rows: slice) -> np.ndarray:
    whole = HostTensor(
        axes="VD",
        shape=tensor.shape,
        stored_shape=tensor.shape,
        head_dim=1,
        dtype=tensor.dtype,
        layers=(tensor,),
        stored_axes="VD",
    )
    return whole.read((slice(*rows.indices(tensor.shape[0])), slice(0, tensor.shape[1])))


def _are_equal(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype == other.dtype:
        return np.array_equal(one.view(np.uint8), other.view(np.uint8))  # NaN equals itself
    return np.array_equal(one.astype(np.float64), other.astype(np.float64))
