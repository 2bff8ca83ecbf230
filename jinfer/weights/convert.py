"""Converts a model folder, such as a Hugging Face one, to an Orbax checkpoint."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from jinfer.errors import CheckpointError
from jinfer.weights.folder import require_unchanged, states_in
from jinfer.weights.host_tensor import HostTensor
from jinfer.weights.hub import WANTED_FILES
from jinfer.weights.load import map_of, open_checked, read_model_config
from jinfer.weights.orbax import ORBAX_FOLDER, not_installed
from jinfer.weights.safetensors import INDEX_FILE
from jinfer.weights.tree import Params, Place, build_tree, require_dtype

# Files to copy besides the weights. The subfolder holds chat templates with other names.
SIDE_FILES = (
    *(name for name in WANTED_FILES if name != "*.safetensors"),
    "additional_chat_templates/*.jinja",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """The size of the checkpoint that `convert` wrote."""

    num_arrays: int
    num_bytes: int


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    on_saved: Callable[[str], object] = lambda name: None,
) -> Conversion:
    """Writes a model folder whose weights are an Orbax checkpoint.

    The host holds one parameter, plus its bytes that are being written. config.json is written
    last, so an interrupted conversion does not look like a model folder.

    Args:
      source: a model folder, in any format that `load_params` reads.
      target: an empty or new folder.
      dtype: dtype of all weights: "float32", "bfloat16" or "float16"; None = as stored.
      on_saved: called with the name of each parameter after it is written.

    Raises:
      CheckpointError: the source is damaged, the target is not empty or cannot be written, a
        value overflows the dtype, or Orbax is not installed.
      ValueError: the dtype is unknown.
    """
    try:
        from jinfer.weights.orbax_save import save_tree  # imports Orbax
    except ModuleNotFoundError as error:
        raise not_installed(error) from None
    files = states_in(source)
    tree = described_tree(source, dtype)
    is_new = not target.exists()
    _require_empty(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_tree(tree, (target / ORBAX_FOLDER).resolve(), on_saved=on_saved)
        require_unchanged(source, files)
        _copy_side_files(source, target)
    except BaseException as error:
        _clear(target, is_new)
        if isinstance(error, OSError | ValueError) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"a checkpoint must be written whole; got {str(target)!r}, where writing failed: "
                f"{str(error).splitlines()[0]:.200}. Make room there, or choose another folder."
            ) from error
        raise
    tensors = jax.tree.leaves(tree)
    return Conversion(
        num_arrays=len(tensors),
        num_bytes=sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors),
    )


def described_tree(source: Path, dtype: str | None) -> Params:
    """The parameters as they will be stored: one array per layer, axes in jinfer's order."""
    config = read_model_config(source)
    wanted_dtype = None if dtype is None else require_dtype(dtype)
    stored = open_checked(source, config)

    def describe(place: Place) -> HostTensor:
        tensor = stored[place.tensors[0].name]
        return HostTensor(
            axes=place.axes,
            shape=place.shape,
            stored_shape=place.shape,
            head_dim=config.head_dim,
            dtype=wanted_dtype or tensor.dtype,
            layers=(tensor,),
            stored_axes="".join(place.tensors[0].groups),
        )

    return build_tree(map_of(source, config), config.num_layers, "unrolled", describe, joined=False)


def _require_empty(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        problem = "is not empty" if target.is_dir() else "is a file"
        raise CheckpointError(
            f"a checkpoint must go into an empty or new folder; got {str(target)!r}, "
            f"which {problem}. Remove it, or choose another."
        )


def _copy_side_files(source: Path, target: Path) -> None:
    paths = {path for pattern in SIDE_FILES for path in source.glob(pattern)}
    config = source / "config.json"
    for path in [*sorted(paths - {config, source / INDEX_FILE}), config]:
        (target / path.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.relative_to(source))


def _clear(target: Path, is_new: bool) -> None:
    """Removes everything in the target, which was empty before the conversion."""
    if not target.is_dir():
        return
    for path in target.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if is_new:
        target.rmdir()
