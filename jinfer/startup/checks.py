"""Range and type checks of the engine's arguments, before any file is read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinfer.config import EngineConfig
from jinfer.request.param_checks import MAX_LOGPROBS
from jinfer.startup.defaults import DTYPES, KV_DTYPES
from jinfer.step.attention import ATTENTION

Check = Callable[[str, Any], None]


def check_config(config: EngineConfig) -> None:
    """Checks every argument against limits that hold for all models and devices.

    Raises:
      ValueError: arguments are invalid; the message names each, its value and the limits.
    """
    problems = []
    for name, check in _CHECKS.items():
        try:
            check(name, getattr(config, name))
        except ValueError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} arguments must be changed:\n{listed}")


def _integer(low: int, high: float = math.inf, *, or_none: bool = True) -> Check:
    def check(name: str, value: Any) -> None:
        if or_none and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an integer; got {name}={value!r}. Pass an int.")
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise ValueError(f"{name} must be {limits}; got {name}={value}. Choose such a value.")

    return check


def _one_of(*allowed: str, or_none: bool = False) -> Check:
    def check(name: str, value: Any) -> None:
        if not (or_none and value is None) and value not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{name} must be one of {listed}; got {name}={value!r}. Choose one.")

    return check


def _path(*, or_none: bool, of: str = "a folder") -> Check:
    def check(name: str, value: Any) -> None:
        if not (or_none and value is None) and not isinstance(value, str | Path):
            raise ValueError(
                f"{name} must be a string or a Path; got {name}={value!r:.60}. Name {of}."
            )

    return check


def _text(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError(
            f"{name} must be a string that is not empty; got {name}={value!r:.60}. "
            "Name a branch, a tag or a commit."
        )


def _token(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str | bool):  # never show the value
        raise ValueError(
            f"{name} must be a string, True or False; got {type(value).__name__}. "
            "Pass an access token of the hub, or True for that of `hf auth login`."
        )


def _mapping(example: dict[str, Any]) -> Check:
    def check(name: str, value: Any) -> None:
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"{name} must be a dict; got {name}={value!r:.60}. Pass such as {example}."
            )

    return check


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {name}={value!r}. Pass a bool.")


def _flag_or_none(name: str, value: Any) -> None:
    if value is not None:
        _flag(name, value)


def _share(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0:
        raise ValueError(
            f"{name} must be a number in (0, 1]; got {name}={value!r}. Choose such a share."
        )


def _milliseconds(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0.0 < value < math.inf):
        raise ValueError(
            f"{name} must be a number above 0; got {name}={value!r}. Pass milliseconds, or None."
        )


def _amount(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0.0 <= value < math.inf):
        raise ValueError(
            f"{name} must be a number, at least 0; got {name}={value!r}. Pass GiB, or None."
        )


_CHECKS: dict[str, Check] = {
    "model": _path(or_none=False),
    "revision": _text,
    "tokenizer": _path(or_none=True),
    "tokenizer_revision": _text,
    "chat_template": _path(or_none=True, of="a template's file, source or name"),
    "download_dir": _path(or_none=True),
    "hf_token": _token,
    "skip_tokenizer_init": _flag,
    "load_format": _one_of("auto", "safetensors", "dummy"),
    "hf_overrides": _mapping({"rope_theta": 1e6}),
    "dtype": _one_of(*DTYPES),
    "kv_cache_dtype": _one_of(*KV_DTYPES),
    "tensor_parallel_size": _integer(1, or_none=False),
    "data_parallel_size": _integer(1, or_none=False),
    "max_model_len": _integer(2),
    "max_num_seqs": _integer(1),
    "max_num_batched_tokens": _integer(1),
    "max_decode_steps": _integer(1, 128),
    "long_prefill_token_threshold": _integer(1),
    "ttft_target_ms": _milliseconds,
    "tpot_target_ms": _milliseconds,
    "enable_prefix_caching": _flag,
    "kv_offloading_size": _amount,
    "page_size": _integer(1),
    "num_pages": _integer(2),
    "gpu_memory_utilization": _share,
    "kv_cache_memory_bytes": _integer(1),
    "seed": _integer(0, 2**32 - 1, or_none=False),
    "generation_config": _path(or_none=False, of='"auto", "vllm" or a folder'),
    "override_generation_config": _mapping({"temperature": 0.7}),
    "max_logprobs": _integer(0, MAX_LOGPROBS, or_none=False),
    "layer_loop": _one_of("scan", "unrolled", or_none=True),
    "attention": _one_of(*ATTENTION, or_none=True),
    "compilation_cache": _path(or_none=True),
    "late_compile": _one_of("warn", "error"),
    "enforce_eager": _flag_or_none,
    "disable_log_stats": _flag,
    "progress": _flag,
}

# Without a check for every argument, the import fails.
assert [field.name for field in fields(EngineConfig)] == list(_CHECKS), "arguments without a check"
