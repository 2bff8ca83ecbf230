"""Engine configurations in files: YAML, one key per argument of the engine."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from jinfer.config import EngineConfig


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of engine arguments, as keywords of `LLM`; examples are in `configs/`.

    Raises:
      ValueError: the file is missing, is not a YAML mapping, or has an unknown key.
    """
    path = Path(path)
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"a configuration must be a file; got {str(path)!r} ({error.strerror}). Name another."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"a configuration must be YAML; got {str(path)!r}: {_one_line(error)}. Correct it."
        ) from None
    if not isinstance(asked, dict):
        raise ValueError(
            f"a configuration must be a mapping of arguments; got {type(asked).__name__} in "
            f"{str(path)!r}. Write lines such as max_num_seqs: 64."
        )
    known = {field.name for field in fields(EngineConfig)}
    for name in asked:
        if name not in known:
            raise ValueError(
                f"a configuration's keys must be arguments of the engine; got {name!r} in "
                f"{str(path)!r}. See `jinfer generate --help`."
            )
    return asked


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
