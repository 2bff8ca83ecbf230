"""A model folder and the JSON files in it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinfer.errors import CheckpointError
from jinfer.models.hf_overrides import with_overrides

FileState = tuple[int, int, int]  # inode, bytes, and the time of the last change
# The files that must belong together; Orbax keeps its own in a subfolder.
MODEL_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", "orbax/**/*")


def state_of(stat: os.stat_result) -> FileState:
    """A value that changes when the file is replaced or written to."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def states_in(folder: Path) -> dict[Path, FileState]:
    """The state of each file of a model: its config.json and its weights."""
    paths = {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return {path: state_of(path.stat()) for path in sorted(paths) if path.is_file()}


def require_unchanged(folder: Path, before: dict[Path, FileState]) -> None:
    """Raises CheckpointError if a file of the model is no longer as `states_in` found it."""
    now = states_in(folder)
    for path in sorted(before.keys() | now.keys()):
        if path not in now:
            raise changed(path, "is gone")
        if path not in before:
            raise changed(path, "is new")
        if now[path] != before[path]:
            raise changed(path, "was written or replaced")


def changed(path: Path, problem: str) -> CheckpointError:
    """The error for a file that changes while its model loads."""
    return CheckpointError(
        f"files of a model must not change while it loads; got {str(path)!r}, which {problem}. "
        "Load the model again when its folder is complete."
    )


def require_model_folder(folder: Path) -> None:
    """Raises CheckpointError unless `folder` is a folder that contains config.json."""
    if not folder.exists():
        problem = "does not exist"
    elif not folder.is_dir():
        problem = "is a file"
    elif not (folder / "config.json").is_file():
        problem = "has no config.json"
    else:
        return
    raise CheckpointError(
        f"a model must be a folder with config.json and weights; got {str(folder)!r}, "
        f"which {problem}. Give a folder from transformers or `jinfer convert`, or a hub name."
    )


def read_hf_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of a model folder's config.json, with the user's `hf_overrides` over it.

    Raises:
      CheckpointError: it is not a model folder, or its config.json is damaged.
      ValueError, NotImplementedError: as from `with_overrides`.
    """
    require_model_folder(folder)
    stored = read_json_object(folder / "config.json")
    return with_overrides(stored, overrides) if overrides else stored


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that must contain an object; else raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the file.") from None
    except (ValueError, RecursionError) as error:  # undecodable text included
        raise CheckpointError(f"{path} is not JSON: {error}. Download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object; got {type(content).__name__}. Download it again."
        )
    return content
