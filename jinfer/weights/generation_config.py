"""Reads the end tokens and the sampling defaults of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinfer.config import GenerationDefaults
from jinfer.errors import CheckpointError, RequestError
from jinfer.log import LOGGER
from jinfer.request.param_checks import MAX_STOP_TOKEN_IDS
from jinfer.request.params import SamplingParams
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
# Keys that would change the text but are not used -> the value that asks for nothing.
UNUSED_KEYS: dict[str, Any] = {
    "bad_words_ids": [],
    "begin_suppress_tokens": [],
    "diversity_penalty": 0,
    "dola_layers": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "penalty_alpha": 0,
    "sequence_bias": None,
    "stop_strings": [],
    "suppress_tokens": [],
    "typical_p": 1,
    "watermarking_config": None,
}


def read_generation_config(
    folder: Path,
    hf_config: Mapping[str, Any],
    *,
    source: str | Path = "auto",
    overrides: Mapping[str, Any] | None = None,
) -> GenerationDefaults:
    """End tokens and sampling defaults of a model folder.

    generation_config.json may be absent. If it has no end tokens, those of config.json are used.
    Only the keys of SAMPLING_KEYS count, as in vLLM, and null counts as absent. `do_sample` does
    not count: a checkpoint with `do_sample` false still samples, unless its temperature is 0. Nor
    does `max_length`: beside `max_new_tokens`, that one decides, as in transformers.

    Logs a warning: `do_sample` contradicts the temperature, or a key of UNUSED_KEYS is set.

    Args:
      folder: the model folder.
      hf_config: its config.json.
      source: "auto" = the folder's file; "vllm" = only its end tokens; else the folder of another
        generation_config.json.
      overrides: keys that win over those of the file; only SAMPLING_KEYS and eos_token_id.

    Raises:
      CheckpointError: if a value has the wrong type or range, or the file is not JSON.
      ValueError: if `source` is no such folder, or a value of `overrides` is unknown or wrong.
    """
    overrides = overrides or {}
    _check_overrides(overrides)
    stored = _read(folder, source)
    content = {**stored, **overrides}
    if source != "vllm":  # a temperature from the user settles what do_sample leaves open
        _warn_of_unused({**content, "do_sample": None} if "temperature" in overrides else content)
    eos = content.get("eos_token_id")
    eos = hf_config.get("eos_token_id") if eos is None else eos
    return GenerationDefaults(
        eos_token_ids=_token_ids(eos, hf_config.get("vocab_size")),
        sampling=_sampling(overrides if source == "vllm" else content),
    )


def _read(folder: Path, source: str | Path) -> dict[str, Any]:
    path = (folder if source in ("auto", "vllm") else Path(source)) / "generation_config.json"
    if path.is_file():
        return read_json_object(path)
    if path.parent != folder:
        raise ValueError(
            "generation_config must be 'auto', 'vllm' or a folder with generation_config.json; "
            f"got generation_config={str(source)!r}. Choose one."
        )
    return {}


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    """The same rules as for the file, but an argument may not hold keys that do nothing."""
    known = [*SAMPLING_KEYS, "eos_token_id"]
    unknown = [key for key in overrides if key not in known]
    if unknown:
        raise ValueError(
            f"override_generation_config takes the keys {', '.join(known)}; got "
            f"{', '.join(map(repr, unknown))}. Set other parameters in SamplingParams."
        )
    named = {SAMPLING_KEYS[key]: overrides[key] for key in SAMPLING_KEYS if key in overrides}
    try:
        SamplingParams.from_defaults({k: v for k, v in named.items() if v is not None})
    except RequestError as error:
        raise ValueError(f"override_generation_config must hold valid values: {error}") from None


def _warn_of_unused(content: Mapping[str, Any]) -> None:
    unused = [
        f"{key}={content[key]!r:.60}"
        for key, nothing in UNUSED_KEYS.items()
        if content.get(key) not in (None, nothing)
    ]
    if unused:
        LOGGER.warning(
            "generation_config.json sets %s, which jinfer does not read from there; set what you "
            "need in SamplingParams",
            ", ".join(unused),
        )
    temperature = content.get("temperature")
    do_sample = content.get("do_sample")
    if do_sample is not None and type(do_sample) is not bool:
        raise CheckpointError(
            "generation_config.json must give do_sample as true or false; got "
            f'{do_sample=}. Correct the file, or ask for generation_config="vllm".'
        )
    if do_sample is False and temperature != 0:
        LOGGER.warning(
            "generation_config.json says do_sample=false, which does not count, as in vLLM: "
            "requests sample at temperature=%s unless they set temperature=0",
            1.0 if temperature is None else temperature,
        )
    if do_sample is True and temperature == 0:
        LOGGER.warning(
            "generation_config.json says do_sample=true, which does not count, as in vLLM: "
            "its temperature=0 takes the likeliest token"
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
