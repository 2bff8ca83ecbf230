"""Free memory of the devices and the host, and the scratch memory of a step."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jinfer.config import EngineConfig, ModelConfig

_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # XLA reads it when it first sees a GPU


def check_host_tier(config: EngineConfig, platform: str) -> None:
    """Checks that the host tier fits into free memory and below XLA's limit for pinned memory.

    Raises:
      ValueError: it does not fit; the message names the limit and, if possible, how to raise it.
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


def free_bytes_each(devices: Sequence[jax.Device]) -> int:
    """Bytes that are free on each of these devices; CPU devices divide the host's memory."""
    free_bytes = min(map(free_device_bytes, devices))
    return free_bytes // (len(devices) if devices[0].platform == "cpu" else 1)


def free_device_bytes(device: jax.Device) -> int:
    """Bytes that are free on the device; on CPU, the machine's available memory."""
    stats: dict[str, Any] | None = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return free_host_bytes()


def free_host_bytes() -> int:
    """Bytes of memory that the machine has available."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    # No portable call reports available memory (macOS): take half of the installed memory.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _pinned_limit_gib() -> int:
    """XLA's rule: the environment variable if set, else 16 if preallocated, else 64."""
    preallocated = os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE", "").lower()
    return int(os.environ.get(_PINNED_LIMIT) or (16 if preallocated in ("1", "true") else 64))


def scratch_bytes(model: ModelConfig, max_slots: int, max_step_tokens: int) -> int:
    """Bytes for a step's float32 logits, the sampler's copies of them, and layer activations."""
    logits = 6 * max_slots * model.vocab_size * 4
    slots = 3 * max_slots * model.vocab_size * 4
    hidden = 4 * max_step_tokens * (model.hidden_size + 2 * model.intermediate_size) * 4
    return logits + slots + hidden
