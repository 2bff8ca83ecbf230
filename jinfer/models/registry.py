"""The supported model families, by the architecture name in config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jinfer.config import ModelConfig
from jinfer.errors import CheckpointError
from jinfer.models import llama
from jinfer.models.weight_map import WeightMap


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The code that is specific to one model family."""

    name: str
    config_keys: frozenset[str]  # of config.json that `config_from_hf` reads
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    weight_map: Callable[[ModelConfig], WeightMap]


LLAMA = Family(
    name="llama",
    config_keys=llama.CONFIG_KEYS,
    config_from_hf=llama.config_from_hf,
    weight_map=llama.weight_map,
)

FAMILY_OF_ARCHITECTURE = {"LlamaForCausalLM": LLAMA}
FAMILIES = {family.name: family for family in FAMILY_OF_ARCHITECTURE.values()}


def architecture(hf: Mapping[str, Any]) -> str:
    """The first entry of `architectures` in config.json."""
    names = hf.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"config.json must name its architecture; got architectures={names!r}. "
            f"Supported: {_supported()}."
        )
    return names[0]


def family_of(hf: Mapping[str, Any]) -> Family:
    """The model family of the architecture in config.json.

    Raises:
      CheckpointError: if config.json names no architecture.
      NotImplementedError: if the architecture is not supported.
    """
    name = architecture(hf)
    if name not in FAMILY_OF_ARCHITECTURE:
        raise NotImplementedError(
            f"the architecture must be a supported one; got architectures[0]={name!r}. "
            f"Supported: {_supported()}."
        )
    return FAMILY_OF_ARCHITECTURE[name]


def _supported() -> str:
    return ", ".join(sorted(FAMILY_OF_ARCHITECTURE))
