"""Finds the folder of a model, and downloads it from the hub if needed."""

import re
from pathlib import Path
from typing import Any

from jinfer.errors import CheckpointError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# No pickles: reading one may run code.
WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
# Subfolders, and Mistral's second copy of the weights, repeat files of the top folder.
UNWANTED_FILES = ("*/*", "consolidated*")


def resolve_model(
    name_or_path: str | Path | None,
    *,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder itself, or the downloaded snapshot of a hub name "org/name".

    Args:
      name_or_path: the folder or the hub name.
      revision: branch, tag or commit on the hub; None = "main".
      download_dir: the folder to download to; None = the hub's cache.
      token: an access token of the hub; True = that of `hf auth login`.

    Raises:
      CheckpointError: if the folder does not exist, or the model cannot be downloaded.
    """
    if not name_or_path or not str(name_or_path).strip():
        raise CheckpointError(
            f"a model must be a folder or a hub name 'org/name'; got model={name_or_path!r}. "
            "Name one."
        )
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        require_no_revision(path, revision)
        return path
    is_hub_name = isinstance(name_or_path, str) and HUB_NAME.fullmatch(name_or_path)
    if path.exists() or not is_hub_name:
        problem = "is a file" if path.exists() else "is not a folder here"
        raise CheckpointError(
            f"a model must be a folder or a hub name 'org/name'; got model={str(name_or_path)!r}, "
            f"which {problem}. Give the folder that holds config.json."
        )
    return _download(str(name_or_path), revision=revision, cache_dir=download_dir, token=token)


def require_no_revision(folder: Path, revision: str | None) -> None:
    """Raises CheckpointError if a revision is asked of a folder, which has only one."""
    if revision not in (None, "main"):
        raise CheckpointError(
            f"a revision belongs to a hub name; got {revision=} with the folder {str(folder)!r}. "
            "Leave it out, or give the name on the hub."
        )


def _download(name: str, **options: Any) -> Path:
    import huggingface_hub  # imported here: the import may take longer than the rest of start-up
    from huggingface_hub import errors

    try:
        snapshot = huggingface_hub.snapshot_download(
            name,
            allow_patterns=list(WANTED_FILES),
            ignore_patterns=list(UNWANTED_FILES),
            **options,
        )
    except errors.GatedRepoError:
        problem = "is gated"
        remedy = "Accept its terms on the hub, and log in with `hf auth login` or pass hf_token."
    except errors.RevisionNotFoundError:
        problem = f"has no revision {options['revision']!r}"
        remedy = "Check the name of the branch, tag or commit."
    except errors.RepositoryNotFoundError:
        problem, remedy = "is not on the hub", "Check the name; a private model needs a login."
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = "is not in the local cache, and the hub cannot be reached"
        remedy = "Connect once to download it, or give a folder."
    except (errors.HFValidationError, OSError) as error:  # network and disk errors are OSErrors
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        problem, remedy = f"could not be downloaded: {reason}", "Try again, or give a folder."
    else:
        return Path(snapshot)
    raise CheckpointError(
        f"a model must be a folder or a hub name; got model={name!r}, which {problem}. {remedy}"
    )
