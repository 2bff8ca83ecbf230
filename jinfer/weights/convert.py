"""From a Hugging Face folder to the same model as an Orbax checkpoint."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from jinfer.errors import CheckpointError
from jinfer.weights.host_tensor import HostTensor
from jinfer.weights.hub import WANTED_FILES
from jinfer.weights.load import map_of, open_checked, read_model_config
from jinfer.weights.orbax import ORBAX_FOLDER, not_installed
from jinfer.weights.safetensors import INDEX_FILE
from jinfer.weights.tree import Params, Place, build_tree, require_dtype

# What stands beside the weights; the folder has the chat templates of other names than the usual.
SIDE_FILES = (
    *(name for name in WANTED_FILES if name != "*.safetensors"),
    "additional_chat_templates/*.jinja",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was written."""

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

    The host holds one parameter, and of it what is on its way to the disk. config.json comes
    last: what was cut off before is no model folder.

    Args:
      source: a model folder, of any kind that `load_params` reads.
      target: a folder that is empty or not there yet.
      dtype: of all weights: "float32", "bfloat16" or "float16"; None = as they are stored.
      on_saved: is given the name of each parameter once it is written.

    Raises:
      CheckpointError: the source is damaged, the target has something in it or cannot be written,
        a value overflows the dtype, or Orbax is not installed.
      ValueError: there is no such dtype.
    """
    try:
        from jinfer.weights.orbax_save import save_tree  # imports Orbax
    except ModuleNotFoundError as error:
        raise not_installed(error) from None
    tree = described_tree(source, dtype)
    is_new = not target.exists()
    _require_empty(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_tree(tree, (target / ORBAX_FOLDER).resolve(), on_saved=on_saved)
        _copy_side_files(source, target)
    except BaseException as error:
        _clear(target, is_new)
        if isinstance(error, OSError | ValueError) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"a checkpoint must be written whole; got {str(target)!r}, where that failed: "
                f"{str(error).splitlines()[0]:.200}. Make room there, or choose another folder."
            ) from error
        raise
    tensors = jax.tree.leaves(tree)
    return Conversion(
        num_arrays=len(tensors),
        num_bytes=sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors),
    )


def described_tree(source: Path, dtype: str | None) -> Params:
    """The parameters as they will be stored: one array per layer, in the order of their axes."""
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
        problem = "has something in it" if target.is_dir() else "is a file"
        raise CheckpointError(
            f"a checkpoint is written into an empty folder or a new one; got {str(target)!r}, "
            f"which {problem}. Remove it, or choose another."
        )


def _copy_side_files(source: Path, target: Path) -> None:
    paths = {path for pattern in SIDE_FILES for path in source.glob(pattern)}
    config = source / "config.json"
    for path in [*sorted(paths - {config, source / INDEX_FILE}), config]:
        (target / path.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.relative_to(source))


def _clear(target: Path, is_new: bool) -> None:
    """Removes what was written; all of it is ours, for there was nothing before."""
    if not target.is_dir():
        return
    for path in target.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if is_new:
        target.rmdir()
