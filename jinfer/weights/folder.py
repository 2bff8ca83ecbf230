"""A model folder and the JSON files in it."""

import json
from pathlib import Path
from typing import Any

from jinfer.errors import CheckpointError


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


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's config.json, unchanged."""
    require_model_folder(folder)
    return read_json_object(folder / "config.json")


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
