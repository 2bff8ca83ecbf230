"""Turns what the user asked into what was decided: EngineConfig to EnginePlan."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.schedule.capacity import plan_pages, token_buckets
from jinfer.step.attention import ATTENTION
from jinfer.step.kv_cache import page_bytes

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlatformDefaults:
    """What `None` in an EngineConfig becomes, by platform."""

    dtype: str
    max_slots: int
    max_step_tokens: int
    page_size: int
    layer_loop: str
    memory_share: float  # of the free memory that the pool may take beside the user's share


# CPU: XLA runs bfloat16 five to eight times slower than float32 there, and other programs need
# the memory too. TPU: page tables live in scalar memory, so pages are larger; scanned layers
# compile fast and fuse. GPU: a scan copies each layer's weights before use, so it is unrolled.
_DEFAULTS = {
    "cpu": PlatformDefaults(
        dtype="float32",
        max_slots=32,
        max_step_tokens=512,
        page_size=16,
        layer_loop="unrolled",
        memory_share=0.5,
    ),
    "gpu": PlatformDefaults(
        dtype="bfloat16",
        max_slots=256,
        max_step_tokens=2048,
        page_size=16,
        layer_loop="unrolled",
        memory_share=1.0,
    ),
    "tpu": PlatformDefaults(
        dtype="bfloat16",
        max_slots=128,
        max_step_tokens=2048,
        page_size=64,
        layer_loop="scan",
        memory_share=1.0,
    ),
}


def platform_of(device: jax.Device) -> str:
    """ "cpu", "gpu" or "tpu"; anything else is refused."""
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    if platform not in _DEFAULTS:
        raise NotImplementedError(
            f"jinfer runs on cpu, gpu and tpu; got platform={device.platform!r}. "
            "Set JAX_PLATFORMS to one of these."
        )
    return platform


def resolve_dtype(config: EngineConfig, platform: str) -> str:
    """The dtype of weights, activations and KV pages."""
    if config.dtype == "auto":
        return _DEFAULTS[platform].dtype
    dtype = {"float": "float32", "half": "float16"}.get(config.dtype, config.dtype)
    if dtype not in _DTYPES:
        raise ValueError(
            f"dtype must be 'auto' or one of {', '.join(_DTYPES)}; got dtype={config.dtype!r}."
        )
    return dtype


def resolve_layer_loop(config: EngineConfig, platform: str) -> str:
    loop = config.layer_loop or _DEFAULTS[platform].layer_loop
    return _one_of("layer_loop", loop, ("scan", "unrolled"))


def resolve_plan(
    config: EngineConfig, model: ModelConfig, *, platform: str, free_bytes: int
) -> EnginePlan:
    """Decides everything that the user left open.

    Args:
      config: what the user asks.
      model: what the checkpoint fixes.
      platform: "cpu", "gpu" or "tpu".
      free_bytes: device memory that is free once the weights are in place.

    Raises:
      ValueError: an argument is out of its range, or the KV cache has no room.
    """
    defaults = _DEFAULTS[platform]
    dtype = resolve_dtype(config, platform)
    max_slots = _at_least("max_num_seqs", config.max_num_seqs, 1) or defaults.max_slots
    max_step_tokens = _at_least("max_num_batched_tokens", config.max_num_batched_tokens, 1) or max(
        defaults.max_step_tokens, max_slots
    )
    page_size = _at_least("page_size", config.page_size, 1) or defaults.page_size
    if not 0.0 < config.gpu_memory_utilization <= 1.0:
        raise ValueError(
            "gpu_memory_utilization must be in (0, 1]; "
            f"got gpu_memory_utilization={config.gpu_memory_utilization}."
        )
    one_page_bytes = page_bytes(model, page_size=page_size, dtype=dtype)
    share = config.gpu_memory_utilization * defaults.memory_share
    room_bytes = int(free_bytes * share) - _scratch_bytes(model, max_slots, max_step_tokens)
    room_tokens = (room_bytes // one_page_bytes - 1) * page_size
    max_model_len = _context(config, model, room_tokens)
    num_pages = plan_pages(
        free_bytes=room_bytes,
        page_bytes=one_page_bytes,
        max_slots=max_slots,
        max_model_len=max_model_len,
        page_size=page_size,
        requested_num_pages=config.num_pages,
    )
    return EnginePlan(
        platform=platform,
        dtype=dtype,
        max_model_len=max_model_len,
        max_slots=max_slots,
        max_step_tokens=max_step_tokens,
        max_chunk_tokens=_at_least(
            "long_prefill_token_threshold", config.long_prefill_token_threshold, 1
        )
        or max_step_tokens,
        page_size=page_size,
        num_pages=num_pages,
        page_bytes=one_page_bytes,
        pages_per_slot=-(-max_model_len // page_size),
        token_buckets=token_buckets(max_step_tokens, max_slots),
        max_logprobs=_max_logprobs(config, model),
        layer_loop=resolve_layer_loop(config, platform),
        attention=_one_of("attention", config.attention or "xla", tuple(ATTENTION)),
    )


def free_device_bytes(device: jax.Device) -> int:
    """Memory that nobody holds on the device now; on CPU, the machine's available memory."""
    stats: dict[str, Any] | None = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    # No portable way to ask what is available (macOS): half of what is installed.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _context(config: EngineConfig, model: ModelConfig, room_tokens: int) -> int:
    asked = _at_least("max_model_len", config.max_model_len, 2)
    if asked is not None and asked > model.max_position:
        raise ValueError(
            "max_model_len must not exceed the context the checkpoint was trained for; got "
            f"max_model_len={asked}, max_position_embeddings={model.max_position}. Lower it."
        )
    if asked is None and config.num_pages is None and room_tokens >= 2:
        return min(model.max_position, room_tokens)  # what fits, where nothing was asked
    return asked or model.max_position


def _max_logprobs(config: EngineConfig, model: ModelConfig) -> int:
    if not 0 <= config.max_logprobs <= 100:
        # Each is a column of every step's output; a whole vocabulary would drown the transfer.
        raise ValueError(
            f"max_logprobs must be in [0, 100]; got max_logprobs={config.max_logprobs}."
        )
    return min(max(config.max_logprobs, 1), model.vocab_size)


def _scratch_bytes(model: ModelConfig, max_slots: int, max_step_tokens: int) -> int:
    """Room for a step's activations: float32 logits with the sampler's copies, and the layers'."""
    logits = 6 * max_slots * model.vocab_size * 4
    slots = 3 * max_slots * model.vocab_size * 4
    hidden = 4 * max_step_tokens * (model.width + 2 * model.mlp_width) * 4
    return logits + slots + hidden


def _at_least(name: str, value: int | None, least: int) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{name} must be an integer; got {name}={value!r}.")
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}; got {name}={value}. Raise it.")
    return value


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {name}={value!r}.")
    return value
