"""The keywords of `LLM` and `AsyncLLM`: their types for editors, and the signature in `help`."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypedDict

from jinfer.config import EngineConfig
from jinfer.shipped import DEFAULT_MODEL


class EngineKeywords(TypedDict, total=False):
    """The fields of `EngineConfig` without `model`; a test compares names and types."""

    revision: str | None
    tokenizer: str | Path | None
    tokenizer_revision: str | None
    chat_template: str | Path | None
    download_dir: str | Path | None
    hf_token: str | bool | None
    skip_tokenizer_init: bool
    load_format: str
    hf_overrides: Mapping[str, Any] | None
    dtype: str
    kv_cache_dtype: str
    tensor_parallel_size: int
    data_parallel_size: int
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    max_decode_steps: int | None
    long_prefill_token_threshold: int | None
    ttft_target_ms: float | None
    tpot_target_ms: float | None
    enable_prefix_caching: bool
    kv_offloading_size: float | None
    page_size: int | None
    num_pages: int | None
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    seed: int
    generation_config: str | Path
    override_generation_config: Mapping[str, Any] | None
    max_logprobs: int
    layer_loop: str | None
    attention: str | None
    compilation_cache: str | Path | None
    late_compile: str
    enforce_eager: bool | None
    disable_log_stats: bool
    progress: bool


class ChatKeywords(TypedDict, total=False):
    """The keywords of `LLM.render`, which `LLM.chat` passes on; a test compares them."""

    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_content_format: str
    tools: Any
    documents: Any
    chat_template_kwargs: Mapping[str, Any] | None
    mm_processor_kwargs: Mapping[str, Any] | None
    cache_salt: str


def full_signature() -> inspect.Signature:
    """The signature of `LLM` with every keyword spelled out, for `help`."""
    keywords = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=field.type,
        )
        for field in fields(EngineConfig)
        if field.default is not MISSING
    ]
    model = inspect.Parameter(
        "model",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=DEFAULT_MODEL,
        annotation=str | Path,
    )
    return inspect.Signature([model, *keywords])
