"""What `None` in an EngineConfig becomes, by platform and chip."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jinfer.config import EngineConfig
from jinfer.startup.chips import chip_of

# Every spelling of a dtype and what it means; None = the platform's own.
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
    """ "cpu", "gpu" or "tpu"; anything else is refused."""
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
    """How the layers are driven: "scan" or "unrolled"."""
    return config.layer_loop or DEFAULTS[platform].layer_loop


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
        return max(DEFAULTS[platform].max_step_tokens, max_slots)
    return 1 << (chip.ridge_tokens + max_slots - 1).bit_length()


def default_page_size(platform: str, kv_dtype: str) -> int:
    """Tokens per page where the user names none."""
    page_size = DEFAULTS[platform].page_size
    is_8_bit = jnp.dtype(kv_dtype).itemsize == 1
    return _8_BIT_PAGE_SIZE.get(platform, page_size) if is_8_bit else page_size
