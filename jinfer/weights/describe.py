"""Describes a model folder without reading its weights."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from jinfer.models.registry import architecture
from jinfer.weights.folder import read_hf_config
from jinfer.weights.generation_config import read_generation_config
from jinfer.weights.load import open_checked, read_model_config

# The first file that exists decides; the order is that of the tokenizer loader.
TOKENIZER_FILES = {"tokenizer.json": "tokenizers", "tokenizer.model": "sentencepiece"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """The facts that `jinfer info` prints."""

    architecture: str
    family: str
    num_parameters: int
    file_bytes: int  # of the weight files
    stored_dtypes: dict[str, int]  # dtype to number of tensors
    max_position_embeddings: int  # tokens of context
    kv_bytes_per_token: dict[str, int]  # dtype of the cache to bytes
    tokenizer: str  # "tokenizers" | "sentencepiece" | "none"
    eos_token_ids: tuple[int, ...]


def describe(folder: Path) -> ModelDescription:
    """Reads the configurations and the tensor tables, and checks that they agree.

    Raises:
      CheckpointError, NotImplementedError: as from `read_model_config` and `load_params`.
    """
    hf, config = read_hf_config(folder), read_model_config(folder)
    stored = open_checked(folder, config)
    places = {tensor.path for tensor in stored.values()}
    kinds = [kind for name, kind in TOKENIZER_FILES.items() if (folder / name).is_file()]
    return ModelDescription(
        architecture=architecture(hf),
        family=config.family,
        num_parameters=config.num_parameters,
        file_bytes=sum(map(_bytes_on_disk, places)),
        stored_dtypes=dict(Counter(tensor.dtype.name for tensor in stored.values())),
        max_position_embeddings=config.max_position_embeddings,
        kv_bytes_per_token={
            "float32": config.kv_bytes_per_token(4),
            "bfloat16": config.kv_bytes_per_token(2),
        },
        tokenizer=kinds[0] if kinds else "none",
        eos_token_ids=read_generation_config(folder, hf).eos_token_ids,
    )


def _bytes_on_disk(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(path.stat().st_size for path in files if path.is_file())
