"""Values for the fields of EngineConfig that are None, by platform and chip."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jinfer.config import EngineConfig
from jinfer.startup.chips import chip_of

# Spelling -> dtype; None = the platform's default.
DTYPES = {
    "auto": None,
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float": "float32",
    "half": "float16",
}
# The same for KV pages; None = the dtype of the weights.
KV_DTYPES = {
    "auto": None,
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
}
# Tokens per page of 8-bit KV caches. The scales of a page then fill whole rows of a TPU's lanes,
# and on a GPU the 128 bytes to which a copy to shared memory is aligned.
_8_BIT_PAGE_SIZE = {"tpu": 128, "gpu": 64}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlatformDefaults:
    """Values for the fields of EngineConfig that are None, on one platform."""

    dtype: str
    max_slots: int
    max_step_tokens: int  # for chips that are not in jinfer.startup.chips
    page_size: int
    max_decode_steps: int
    layer_loop: str
    bucket_growth: int  # ratio of neighbouring token buckets
    row_growth: int  # ratio of neighbouring decode buckets
    few_rows: int  # the smallest decode bucket above one row
    step_cost_tokens: int  # fixed cost of a step, in tokens
    memory_share: float  # of free memory; the user's fraction is multiplied by it


# CPU: XLA runs bfloat16 five to eight times slower than float32. Other processes need the memory
# too. Compiling a program takes seconds, so there are fewer token buckets. A padding row of a
# decode costs as much as a real one, so decode buckets are closer together.
# TPU: page tables live in scalar memory, so pages are larger. Scanned layers compile fast and fuse.
# The kernel skips padding rows, so there is no decode bucket of 8.
# GPU: a scan copies each layer's weights before use, so layers are unrolled.
# step_cost_tokens: the time to read the weights, measured on a CPU; known chips use their
# `ridge_tokens` instead.
# max_step_tokens on a CPU: measured, 125M float32 parameters on two cores of a Zen 5: steps of 64,
# 128, 256 and 512 tokens computed 666, 833, 946 and 999 tokens per second of processor time. On
# chips that are not in the table: more than any chip in the table needs.
DEFAULTS = {
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


def platform_of(device: jax.Device) -> str:
    """Returns "cpu", "gpu" or "tpu"; raises NotImplementedError for other platforms."""
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    if platform not in DEFAULTS:
        raise NotImplementedError(
            f"jinfer runs on cpu, gpu and tpu; got platform={device.platform!r}. "
            "Set JAX_PLATFORMS to one of these."
        )
    return platform


def resolve_dtype(config: EngineConfig, platform: str) -> str:
    """The dtype of weights and activations."""
    return DTYPES[config.dtype] or DEFAULTS[platform].dtype


def resolve_layer_loop(config: EngineConfig, platform: str) -> str:
    """The loop over layers: "scan" or "unrolled"."""
    return config.layer_loop or DEFAULTS[platform].layer_loop


def default_step_tokens(platform: str, device_kind: str, max_slots: int) -> int:
    """The default token budget of a step: the smallest that keeps the chip's arithmetic busy.

    A chip is busy from `Chip.ridge_tokens` on. One token per slot is added, so that a prompt still
    gets `ridge_tokens` while all other slots decode. The sum is rounded up to a power of two, from
    which the token buckets are derived.

    Args:
      platform: "cpu", "gpu" or "tpu".
      device_kind: the chip, as `jax.Device.device_kind` names it.
      max_slots: sequences that run at the same time.
    """
    chip = chip_of(device_kind)
    if chip is None:
        return max(DEFAULTS[platform].max_step_tokens, max_slots)
    return 1 << (chip.ridge_tokens + max_slots - 1).bit_length()


def default_page_size(platform: str, kv_dtype: str) -> int:
    """The default number of tokens per page."""
    page_size = DEFAULTS[platform].page_size
    is_8_bit = jnp.dtype(kv_dtype).itemsize == 1
    return _8_BIT_PAGE_SIZE.get(platform, page_size) if is_8_bit else page_size
