"""Engine configurations in files: YAML, one key per argument of the engine."""

from pathlib import Path
from typing import Any

import yaml

from jinfer.arguments.vllm import translated


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice; YAML would take the later value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = set()
        for key, _ in node.value:
            said = (key.tag, str(key.value))
            if said in found:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            found.add(said)
        return super().construct_mapping(node, deep)


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of engine arguments, as keywords of `LLM`; examples are in `configs/`.

    Keys may have dashes for underscores, and may be names of vLLM.

    Raises:
      ValueError: the file is missing, is not a YAML mapping, or has keys that `LLM` refuses.
    """
    path = Path(path)
    try:
        asked = yaml.load(path.read_text(encoding="utf-8"), _Loader)
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
    named = [str(name).replace("-", "_") for name in asked]
    try:
        if len(set(named)) < len(named):
            raise TypeError("a key may be there once, with dashes or underscores. Remove one.")
        return translated(dict(zip(named, asked.values(), strict=True)))
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"a configuration must hold arguments of the engine; got {str(path)!r}: {error}"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
