"""The small story models that ship inside the package.

The code that made the models is in `training/`: `corpus.py` cleans the texts and trains the
tokenizer, `model.py` is the training forward pass, `train.py` trains the weights, `export.py`
writes and reads Hugging Face folders, and `evaluate.py` measures a folder on held-out text and
prints samples from it.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def target_folder() -> Path:
    """Returns the folder of the shipped target model, in Hugging Face layout."""
    return _HERE / "target"


def draft_folder() -> Path:
    """Returns the folder of the shipped draft model: same tokenizer, few weights."""
    return _HERE / "draft"


DEFAULT_MODEL = "fable"
_FOLDERS = {DEFAULT_MODEL: target_folder, f"{DEFAULT_MODEL}-draft": draft_folder}


def find_shipped(name: str | Path) -> Path | None:
    """Returns the folder of the shipped model with this name, or None; a Path is never a name."""
    folder = _FOLDERS.get(name) if isinstance(name, str) else None
    return folder() if folder is not None else None
