"""Loads a model folder into a tree of arrays, one parameter at a time.

Each parameter is copied from its file block by block, permuted and converted, directly
into the buffer that goes to the device. The host never holds more than one parameter, except
those of a CPU device.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jinfer.config import ModelConfig
from jinfer.errors import CheckpointError, shown
from jinfer.log import LOGGER
from jinfer.models.registry import FAMILIES, family_of
from jinfer.models.weight_map import WeightMap
from jinfer.weights.embeddings import holds_two, named_as_embedding
from jinfer.weights.folder import read_hf_config, require_model_folder
from jinfer.weights.host_tensor import HostTensor, JoinedTensor, Stored
from jinfer.weights.layout import Hold
from jinfer.weights.orbax import is_orbax, open_orbax, own_map
from jinfer.weights.safetensors import is_safetensors, open_checkpoint
from jinfer.weights.tree import FLOAT_DTYPES, Params, Place, build_tree, require_dtype

Tensor = HostTensor | JoinedTensor
Put = Callable[[str, Tensor], jax.Array]

MAX_NAMED = 5  # an error lists at most this many tensor names


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """The size and time of loading; `str()` of it is the start-up line."""

    num_tensors: int
    file_bytes: int  # of the stored tensors
    param_bytes: int  # of the arrays, in the requested dtype
    elapsed_s: float

    def __str__(self) -> str:
        return (
            f"loaded {self.num_tensors} tensors, {self.file_bytes / 1e9:.2f} GB, "
            f"in {self.elapsed_s:.1f} s ({self.file_bytes / 1e9 / self.elapsed_s:.2f} GB/s)"
        )


def read_model_config(
    folder: Path, *, weights: bool = True, overrides: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The ModelConfig of a model folder: that of config.json, tied only if the files agree.

    Args:
      folder: a Hugging Face model folder, or one from `jinfer convert`.
      weights: False = read config.json alone; its weights will not be loaded.
      overrides: keys that win over those of config.json, `hf_overrides`.

    Raises:
      CheckpointError: if it is not a model folder, or its config.json is invalid.
      NotImplementedError: if the architecture or one of its settings is not supported.
      ValueError: if a key of `overrides` is not read.
    """
    hf = read_hf_config(folder, overrides)
    try:
        config = _parsed(folder, hf)
    except (CheckpointError, NotImplementedError) as error:
        if not overrides:
            raise
        raise type(error)(f"with hf_overrides={shown(dict(overrides))}, {error}") from None
    if not weights or not config.tie_word_embeddings or not _has_weights(folder):
        return config
    untied = replace(config, tie_word_embeddings=False)
    if not holds_two(_open_stored(folder), map_of(folder, untied)):
        return config
    LOGGER.warning(
        "%s holds an lm_head of its own, which is used, though config.json says "
        "tie_word_embeddings=true; set it to false there to silence this line",
        folder,
    )
    return untied


def load_params(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: str,
    layer_loop: str,
    padded: ModelConfig | None = None,
    put: Put | None = None,
    joined: bool = True,
) -> tuple[Params, LoadReport]:
    """Reads every parameter of a checkpoint.

    Args:
      folder: a model folder, with safetensors or from `jinfer convert`.
      config: the result of `read_model_config(folder)`.
      dtype: dtype of the parameters: "float32", "bfloat16" or "float16", whatever is stored.
      layer_loop: "unrolled" gives a dict per layer, "scan" one dict with a leading L axis.
      padded: the padded model, `jinfer.parallel.model_shards.padded_model`; None = as stored.
      put: moves one parameter to its device or devices, given its path in the tree, such as
        "blocks.3.w_o_DQ" or, stacked, "blocks.w_o_DQ"; None = to the first device, not sharded.
      joined: True = the tree for the decoder, with fused parameters; False = no fused parameters.

    Returns:
      The tree, after all transfers have finished, and a report.

    Raises:
      CheckpointError: if tensors are missing, extra, damaged, misshapen or not floating point.
    """
    started_s = time.perf_counter()
    wanted_dtype = require_dtype(dtype)
    weights = map_of(folder, config)
    padded_weights = map_of(folder, padded or config)
    stored = open_checked(folder, config)
    put = put or put_on_first_device

    def tensor_at(place: Place) -> HostTensor:
        return HostTensor(
            axes=place.axes,
            shape=place.shape,
            stored_shape=place.shape_in(weights),
            head_dim=config.head_dim,
            dtype=wanted_dtype,
            layers=tuple(stored[tensor.name] for tensor in place.tensors),
            stored_axes="".join(place.tensors[0].groups),
        )

    def make(place: Place) -> jax.Array:
        if not place.parts:
            return put(place.path, tensor_at(place))
        parts = tuple(map(tensor_at, place.parts))
        return put(place.path, JoinedTensor(axes=place.axes, shape=place.shape, parts=parts))

    params = build_tree(padded_weights, config.num_layers, layer_loop, make, joined=joined)
    jax.block_until_ready(params)
    used = [stored[tensor.name] for tensor in weights.stored_tensors(config.num_layers)]
    return params, LoadReport(
        num_tensors=len(used),
        file_bytes=sum(tensor.num_bytes for tensor in used),
        param_bytes=sum(array.nbytes for array in jax.tree.leaves(params)),
        elapsed_s=time.perf_counter() - started_s,
    )


def map_of(folder: Path, config: ModelConfig) -> WeightMap:
    """Maps each parameter to its tensor in the folder's files."""
    weights = FAMILIES[config.family].weight_map(config)
    return own_map(weights) if is_orbax(folder) else weights


def open_checked(folder: Path, config: ModelConfig) -> Mapping[str, Stored]:
    """The tensors in the folder's files, checked against the model; reads no weights.

    Raises:
      CheckpointError: as from `load_params`.
    """
    require_model_folder(folder)
    stored = _open_stored(folder)
    if config.tie_word_embeddings:
        untied = map_of(folder, replace(config, tie_word_embeddings=False))
        stored = named_as_embedding(stored, untied)
    check_tensors(stored, map_of(folder, config), config.num_layers)
    return stored


def param_shapes(padded: ModelConfig, *, dtype: str, layer_loop: str, hold: Hold) -> Params:
    """The shapes of the tree that `load_params` returns, to compile programs before loading."""
    wanted_dtype = require_dtype(dtype)

    def make(place: Place) -> jax.ShapeDtypeStruct:
        where: Any = hold(place.path, place.axes)
        return jax.ShapeDtypeStruct(place.shape, wanted_dtype, sharding=where)

    weights = FAMILIES[padded.family].weight_map(padded)
    return build_tree(weights, padded.num_layers, layer_loop, make)


def put_on_first_device(path: str, tensor: Tensor) -> jax.Array:
    """Moves a parameter to the first device. On CPU the array uses the host buffer, no copy."""
    del path
    return jax.device_put(tensor.read(), jax.devices()[0])


def check_tensors(stored: Mapping[str, Stored], weights: WeightMap, num_layers: int) -> None:
    """Raises CheckpointError unless the files hold exactly the tensors of the model."""
    wanted = {tensor.name: tensor for tensor in weights.stored_tensors(num_layers)}
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted and name not in weights.ignored]
    if missing or extra:
        raise CheckpointError(
            "the files must hold exactly the tensors that config.json implies; "
            f"got {_listed(missing)} missing, {_listed(extra)} extra. "
            "Use the config.json that was saved with the weights."
        )
    for name, tensor in wanted.items():
        got, shape = stored[name], weights.stored_shape(tensor)
        if got.shape != shape:
            raise CheckpointError(
                f"{name} must have the shape that config.json implies, {shape}; "
                f"got shape={got.shape}. Use the config.json that was saved with the weights."
            )
        if got.dtype not in FLOAT_DTYPES.values():
            raise CheckpointError(
                f"{name} must be stored as one of {', '.join(FLOAT_DTYPES)}; "
                f"got dtype={got.dtype}. Use the unquantized checkpoint."
            )


def _parsed(folder: Path, hf: Mapping[str, Any]) -> ModelConfig:
    try:
        return family_of(hf).config_from_hf(hf)
    except CheckpointError:
        raise
    except ValueError as error:  # numbers that contradict each other
        raise CheckpointError(
            f"{folder / 'config.json'} contradicts itself: {error} Correct the file."
        ) from None


def _open_stored(folder: Path) -> Mapping[str, Stored]:
    return open_orbax(folder) if is_orbax(folder) else open_checkpoint(folder)


def _has_weights(folder: Path) -> bool:
    return is_orbax(folder) or is_safetensors(folder)


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    rest = ", ..." if len(names) > MAX_NAMED else ""
    return f"{len(names)} ({', '.join(names[:MAX_NAMED])}{rest})"
