"""Turns what the user asked into what was decided: EngineConfig to EnginePlan."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.parallel.model_shards import chip_shard, padded_model
from jinfer.schedule.capacity import plan_pages, row_buckets, token_buckets
from jinfer.startup.chips import chip_of
from jinfer.step.attention import ATTENTION, default_attention, stored_head_dim
from jinfer.step.kv_cache import page_bytes
from jinfer.step.page_moves import GROUPS_AT_ONCE, PAGES_PER_MOVE

Check = Callable[[str, Any], None]

_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # XLA reads it when it first sees a GPU

# Every spelling of a dtype and what it means; None = the platform's own.
_DTYPES = {
    "auto": None,
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float": "float32",
    "half": "float16",
}
# The same for KV pages; None = the dtype of the weights.
_KV_DTYPES = {
    "auto": None,
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
}
# Tokens per page where pages hold 8 bits: their scales then fill whole rows of a TPU's lanes, and
# on a GPU the 128 bytes that a copy to shared memory lands on.
_8_BIT_PAGE_SIZE = {"tpu": 128, "gpu": 64}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlatformDefaults:
    """What `None` in an EngineConfig becomes, by platform."""

    dtype: str
    max_slots: int
    max_step_tokens: int  # of a chip that the table of jinfer.startup.chips does not have
    page_size: int
    max_decode_steps: int
    layer_loop: str
    bucket_growth: int  # ratio of neighbouring step sizes
    row_growth: int  # the same of decode programs
    few_rows: int  # of the smallest decode program but that of one row
    step_cost_tokens: int  # a step takes as long as its tokens and so many more
    memory_share: float  # of the free memory that the pool may take beside the user's share


# CPU: XLA runs bfloat16 five to eight times slower than float32 there, other programs need the
# memory too, and compiling costs seconds a program, so there are fewer; but a padding row of a
# decode costs as much as a real one, and so the row counts are closer. TPU: page tables live in
# scalar memory, so pages are larger; scanned layers compile fast and fuse; the kernel passes over
# padding rows, so there is no decode program of 8. GPU: a scan copies each layer's weights before
# use, so it is unrolled.
# A step's own cost is the time to read the weights, in tokens: measured on a CPU; the ridge of the
# chip where it is known.
# Tokens of a step on a CPU: measured, 125M float32 parameters on two cores of a Zen 5: steps of 64,
# 128, 256 and 512 tokens computed 666, 833, 946 and 999 tokens per second of processor time. On
# chips that are not in the table: more than any of the table needs.
_DEFAULTS = {
    "cpu": PlatformDefaults(
        dtype="float32",
        max_slots=32,
        max_step_tokens=512,
        page_size=16,
        max_decode_steps=8,
        layer_loop="unrolled",
        bucket_growth=4,
        row_growth=2,
        few_rows=8,
        step_cost_tokens=32,
        memory_share=0.5,
    ),
    "gpu": PlatformDefaults(
        dtype="bfloat16",
        max_slots=256,
        max_step_tokens=2048,
        page_size=16,
        max_decode_steps=32,
        layer_loop="unrolled",
        bucket_growth=2,
        row_growth=4,
        few_rows=8,
        step_cost_tokens=256,
        memory_share=1.0,
    ),
    "tpu": PlatformDefaults(
        dtype="bfloat16",
        max_slots=128,
        max_step_tokens=2048,
        page_size=64,
        max_decode_steps=32,
        layer_loop="scan",
        bucket_growth=2,
        row_growth=4,
        few_rows=32,
        step_cost_tokens=256,
        memory_share=1.0,
    ),
}


def check_config(config: EngineConfig) -> None:
    """Refuses what no model and no device could make sense of, before anything is read.

    Raises:
      ValueError: naming the argument, its value and what it may be.
    """
    for name, check in _CHECKS.items():
        check(name, getattr(config, name))


def check_host_tier(config: EngineConfig, platform: str) -> None:
    """Refuses a host tier that the machine has no room for, or that XLA would not pin.

    Raises:
      ValueError: naming the limit, and how to raise it where that can be.
    """
    asked_gib = config.kv_offloading_size or 0
    free_gib = free_host_bytes() / 2**30
    if asked_gib > free_gib:
        raise ValueError(
            f"kv_offloading_size must fit into the machine's free memory, {free_gib:.1f} GiB; got "
            f"kv_offloading_size={asked_gib}. Lower it."
        )
    pinned_gib = _pinned_limit_gib()
    if platform == "gpu" and asked_gib >= pinned_gib:  # transfers need a little of it too
        raise ValueError(
            f"kv_offloading_size must be below the {pinned_gib} GiB that XLA pins on GPU machines; "
            f"got kv_offloading_size={asked_gib}. Lower it, or set {_PINNED_LIMIT} to more before "
            "the process starts."
        )


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
    """The dtype of weights and activations."""
    return _DTYPES[config.dtype] or _DEFAULTS[platform].dtype


def resolve_layer_loop(config: EngineConfig, platform: str) -> str:
    """How the layers are driven: "scan" or "unrolled"."""
    return config.layer_loop or _DEFAULTS[platform].layer_loop


def resolve_plan(
    config: EngineConfig,
    model: ModelConfig,
    *,
    platform: str,
    free_bytes: int,
    device_kind: str = "",
) -> EnginePlan:
    """Decides everything that the user left open.

    Args:
      config: what the user asks.
      model: what the checkpoint fixes.
      platform: "cpu", "gpu" or "tpu".
      free_bytes: memory of each device that is free once the weights are in place.
      device_kind: the chip, as `jax.Device.device_kind` names it.

    Raises:
      ValueError: an argument is out of its range, the model cannot be cut evenly, or the KV cache
        has no room.
    """
    defaults = _DEFAULTS[platform]
    dtype = resolve_dtype(config, platform)
    padded = padded_model(model, config.tensor_parallel_size)
    shard = chip_shard(padded, config.tensor_parallel_size)
    max_slots = config.max_num_seqs or defaults.max_slots
    max_step_tokens = config.max_num_batched_tokens or default_step_tokens(
        platform, device_kind, max_slots
    )
    chip = chip_of(device_kind)
    max_decode_steps = config.max_decode_steps or defaults.max_decode_steps
    kv_dtype = _KV_DTYPES[config.kv_cache_dtype] or dtype
    attention = config.attention or default_attention(model, platform=platform, dtype=dtype)
    kv_head_dim = stored_head_dim(attention, model.head_dim)
    page_size = config.page_size or default_page_size(platform, kv_dtype)
    one_page_bytes = page_bytes(shard, page_size=page_size, dtype=kv_dtype, head_dim=kv_head_dim)
    memory_share = config.gpu_memory_utilization * defaults.memory_share
    scratch_bytes = _scratch_bytes(shard, max_slots, max_step_tokens)
    if config.kv_offloading_size:  # pages on their way, of two plans in both directions
        scratch_bytes += 4 * GROUPS_AT_ONCE * PAGES_PER_MOVE * one_page_bytes
    room_bytes = max(0, int(free_bytes * memory_share) - scratch_bytes)
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
        kv_dtype=kv_dtype,
        kv_head_dim=kv_head_dim,
        tensor_parallel_size=config.tensor_parallel_size,
        vocab_size=padded.vocab_size,
        max_model_len=max_model_len,
        max_slots=max_slots,
        max_step_tokens=max_step_tokens,
        max_chunk_tokens=config.long_prefill_token_threshold or max_step_tokens,
        page_size=page_size,
        num_pages=num_pages,
        page_bytes=one_page_bytes,
        num_host_pages=_num_host_pages(config, one_page_bytes * config.tensor_parallel_size),
        pages_per_slot=-(-max_model_len // page_size),
        token_buckets=token_buckets(
            max_step_tokens,
            max_slots,
            defaults.bucket_growth,
            chip.ridge_tokens if chip else 0,
            decodes=max_decode_steps == 1,
        ),
        step_cost_tokens=chip.ridge_tokens if chip else defaults.step_cost_tokens,
        decode_buckets=()
        if max_decode_steps == 1
        else row_buckets(max_slots, defaults.row_growth, defaults.few_rows),
        max_decode_steps=max_decode_steps,
        max_logprobs=min(max(config.max_logprobs, 1), model.vocab_size),
        layer_loop=resolve_layer_loop(config, platform),
        weight_layout=_weight_layout(device_kind, dtype),
        attention=attention,
    )


def free_bytes_each(devices: Sequence[jax.Device]) -> int:
    """Memory that is free on each of these devices now; those of a CPU share one memory."""
    free_bytes = min(map(free_device_bytes, devices))
    return free_bytes // (len(devices) if devices[0].platform == "cpu" else 1)


def free_device_bytes(device: jax.Device) -> int:
    """Memory that nobody holds on the device now; on CPU, the machine's available memory."""
    stats: dict[str, Any] | None = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return free_host_bytes()


def free_host_bytes() -> int:
    """The machine's available memory."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    # No portable way to ask what is available (macOS): half of what is installed.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _weight_layout(device_kind: str, dtype: str) -> str:
    """See jinfer/weights/layout.py; other dtypes and chips are multiplied as they lie."""
    return "16x128" if device_kind == "TPU7x" and dtype == "bfloat16" else "default"


def default_step_tokens(platform: str, device_kind: str, max_slots: int) -> int:
    """The token budget of a step where the user names none: the smallest that fills the chip.

    A chip's arithmetic is busy from `Chip.ridge_tokens` on. So that a prompt gets that much of a
    step in which all other slots decode, a token for each of them comes on top; then up to the
    next power of two, of which the step sizes are made.

    Args:
      platform: "cpu", "gpu" or "tpu".
      device_kind: the chip, as `jax.Device.device_kind` names it.
      max_slots: sequences that run at the same time.
    """
    chip = chip_of(device_kind)
    if chip is None:
        return max(_DEFAULTS[platform].max_step_tokens, max_slots)
    return 1 << (chip.ridge_tokens + max_slots - 1).bit_length()


def default_page_size(platform: str, kv_dtype: str) -> int:
    """Tokens per page where the user names none."""
    page_size = _DEFAULTS[platform].page_size
    is_8_bit = jnp.dtype(kv_dtype).itemsize == 1
    return _8_BIT_PAGE_SIZE.get(platform, page_size) if is_8_bit else page_size


def _context(config: EngineConfig, model: ModelConfig, room_tokens: int) -> int:
    asked = config.max_model_len
    if asked is not None and asked > model.max_position_embeddings:
        raise ValueError(
            "max_model_len must not exceed the context the checkpoint was trained for; got "
            f"max_model_len={asked}, max_position_embeddings={model.max_position_embeddings}. "
            "Lower it."
        )
    if asked is None and config.num_pages is None and room_tokens >= 2:
        return min(model.max_position_embeddings, room_tokens)  # what fits, where nothing was asked
    return asked or model.max_position_embeddings


def _num_host_pages(config: EngineConfig, one_page_bytes: int) -> int:
    if config.kv_offloading_size and not config.enable_prefix_caching:
        raise ValueError(
            "kv_offloading_size keeps pages of the prefix cache; got kv_offloading_size="
            f"{config.kv_offloading_size} with enable_prefix_caching=False. Enable it."
        )
    num_pages = int((config.kv_offloading_size or 0) * 2**30) // one_page_bytes
    if config.kv_offloading_size and not num_pages:
        raise ValueError(
            f"kv_offloading_size must hold a page, {one_page_bytes / 2**30:.3g} GiB; got "
            f"kv_offloading_size={config.kv_offloading_size}. Raise it, or leave it out."
        )
    return num_pages


def _pinned_limit_gib() -> int:
    """XLA's own rule: what the environment says, or 16 where it is taken at once, else 64."""
    preallocated = os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE", "").lower()
    return int(os.environ.get(_PINNED_LIMIT) or (16 if preallocated in ("1", "true") else 64))


def _scratch_bytes(model: ModelConfig, max_slots: int, max_step_tokens: int) -> int:
    """Room for a step's activations: float32 logits with the sampler's copies, and the layers'."""
    logits = 6 * max_slots * model.vocab_size * 4
    slots = 3 * max_slots * model.vocab_size * 4
    hidden = 4 * max_step_tokens * (model.hidden_size + 2 * model.intermediate_size) * 4
    return logits + slots + hidden


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


def _path(*, or_none: bool) -> Check:
    def check(name: str, value: Any) -> None:
        if not (or_none and value is None) and not isinstance(value, str | Path):
            raise ValueError(
                f"{name} must be a string or a Path; got {name}={value!r:.60}. Name a folder."
            )

    return check


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {name}={value!r}. Pass a bool.")


def _share(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1]; got {name}={value!r}. Choose such a share.")


def _milliseconds(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0.0 < value < math.inf):
        raise ValueError(
            f"{name} must be above 0; got {name}={value!r}. Pass milliseconds, or None."
        )


def _amount(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0.0 <= value < math.inf):
        raise ValueError(f"{name} must be at least 0; got {name}={value!r}. Pass GiB, or None.")


_CHECKS: dict[str, Check] = {
    "model": _path(or_none=False),
    "tokenizer": _path(or_none=True),
    "skip_tokenizer_init": _flag,
    "load_format": _one_of("auto", "safetensors", "dummy"),
    "dtype": _one_of(*_DTYPES),
    "kv_cache_dtype": _one_of(*_KV_DTYPES),
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
    "seed": _integer(0, 2**32 - 1, or_none=False),
    "generation_config": _one_of("auto", "vllm"),
    # Each is a column of every step's output; a whole vocabulary would drown the transfer.
    "max_logprobs": _integer(0, 100, or_none=False),
    "layer_loop": _one_of("scan", "unrolled", or_none=True),
    "attention": _one_of(*ATTENTION, or_none=True),
    "compilation_cache": _path(or_none=True),
    "late_compile": _one_of("warn", "error"),
    "progress": _flag,
}

# Every argument has its check, or the module does not import.
assert [field.name for field in fields(EngineConfig)] == list(_CHECKS), "arguments without a check"
