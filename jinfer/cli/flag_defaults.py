"""The defaults of flags, as `--help` prints them."""

from dataclasses import fields
from typing import Any

from jinfer.config import EngineConfig
from jinfer.request.params import SamplingParams

# Most output tokens, if neither the command nor the model says: up to two screens of text.
MAX_TOKENS = {"generate": 256, "chat": 1024}

# The meaning of None, field by field.
UNSET = {
    "revision": "main",
    "tokenizer": "the model's",
    "tokenizer_revision": "as --revision, if the tokenizer is the model's",
    "chat_template": "the model's",
    "download_dir": "the hub's cache",
    "hf_token": "the login, if there is one",
    "hf_overrides": "none",
    "max_model_len": "the model's context, if it fits",
    "max_num_seqs": "32 on CPU, 128 on TPU, 256 on GPU",
    "max_num_batched_tokens": "by chip; 512 on CPU",
    "max_decode_steps": "8 on CPU, else 32",
    "long_prefill_token_threshold": "no limit",
    "ttft_target_ms": "none",
    "tpot_target_ms": "none",
    "kv_offloading_size": "none",
    "page_size": "64 on TPU, else 16; more for 8-bit caches",
    "num_pages": "as many as fit",
    "kv_cache_memory_bytes": "what is free",
    "override_generation_config": "none",
    "layer_loop": "scan on TPU, else unrolled",
    "attention": "the platform's",
    "compilation_cache": "the user's cache folder",
    "seed": "one for each prompt, from --engine-seed",
    "logit_bias": "none",
    "allowed_token_ids": "all",
    "logprobs": "none",
    "prompt_logprobs": "none",
}
# Flags that are no field, or whose default is the command's own.
_OTHERS = {
    "engine_seed": "0",
    "config": "none",
    "coordinator_address": "none: one host",
    "num_processes": "1, or the cluster's",
    "process_id": "0, or the cluster's",
}
_FIELDS = {f.name: f.default for kind in (EngineConfig, SamplingParams) for f in fields(kind)}


def default_of(name: str) -> str:
    """The default of a flag with a value, in words; `max_tokens` is the command's own."""
    if name in _OTHERS:
        return _OTHERS[name]
    if name in UNSET:
        return UNSET[name]
    value: Any = _FIELDS[name]
    if value == ():
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
