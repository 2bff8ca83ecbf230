"""Reads the end tokens and the sampling defaults of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinfer.config import GenerationDefaults
from jinfer.errors import CheckpointError, RequestError
from jinfer.request.params import MAX_STOP_TOKEN_IDS, SamplingParams
from jinfer.weights.folder import read_json_object

# Key of generation_config.json to field of SamplingParams.
SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_generation_config(
    folder: Path, hf_config: Mapping[str, Any], *, sampling: bool = True
) -> GenerationDefaults:
    """End tokens and sampling defaults of a model folder.

    generation_config.json may be absent. If it has no end tokens, those of config.json are used.
    Only the keys of SAMPLING_KEYS count, and null counts as absent. `do_sample` is ignored, as in
    vLLM: a checkpoint with `do_sample` false still samples, unless its temperature is 0.

    Args:
      folder: the model folder.
      hf_config: its config.json, unchanged.
      sampling: False = do not read the sampling defaults.

    Raises:
      CheckpointError: if a value has the wrong type or range, or the file is not JSON.
    """
    path = folder / "generation_config.json"
    content = read_json_object(path) if path.is_file() else {}
    eos = content.get("eos_token_id")
    eos = hf_config.get("eos_token_id") if eos is None else eos
    return GenerationDefaults(
        eos_token_ids=_token_ids(eos, hf_config.get("vocab_size")),
        sampling=_sampling(content) if sampling else {},
    )


def _token_ids(value: Any, vocab_size: int | None) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise CheckpointError(
            f"end tokens must be one id or a list of ids; got eos_token_id={value!r}. "
            "Correct generation_config.json or config.json."
        )
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        raise CheckpointError(
            f"end tokens must lie in the vocabulary; got eos_token_id={max(ids)} with "
            f"{vocab_size=}. Correct generation_config.json or config.json."
        )
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise CheckpointError(
            f"a model may have at most {MAX_STOP_TOKEN_IDS} end tokens; got {len(ids)}. "
            "Correct generation_config.json or config.json."
        )
    return tuple(ids)


def _sampling(content: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults by SamplingParams field; checked here, once, and not for every request."""
    found = {
        field: _number(key, content[key])
        for key, field in SAMPLING_KEYS.items()
        if content.get(key) is not None
    }
    try:
        SamplingParams.from_defaults(found)
    except RequestError as error:
        raise CheckpointError(
            f"generation_config.json must have valid sampling defaults: {error} "
            'Correct the file, or ask for generation_config="vllm".'
        ) from None
    return found


def _number(key: str, value: Any) -> int | float:
    if type(value) not in (int, float):
        raise CheckpointError(
            f"generation_config.json must give {key} as a number; got {key}={value!r}. "
            'Correct the file, or ask for generation_config="vllm".'
        )
    return value
