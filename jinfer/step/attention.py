"""Paged-attention implementations by name. One is chosen at start-up; the kernels join here."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from jinfer.config import ModelConfig
from kernels_pallas.paged_attention.gpu import paged_attention_gpu
from kernels_pallas.paged_attention.tpu import paged_attention_tpu
from kernels_pallas.paged_attention.xla import paged_attention_xla

# The contract: kernels_pallas/paged_attention/contract.py.
ATTENTION: dict[str, Callable[..., Any]] = {
    "xla": paged_attention_xla,  # portable; one query tile at a time suits a CPU
    "xla_wide": partial(paged_attention_xla, tiles_at_once=32),  # the same for wider devices
    "tpu": paged_attention_tpu,
    "gpu": paged_attention_gpu,  # Hopper only; by name until it has run on one
    # The TPU kernel simulated on a CPU: slow, for finding out which of the two is wrong.
    "tpu_interpret": partial(paged_attention_tpu, interpret=pltpu.InterpretParams()),
}


def default_attention(model: ModelConfig, *, platform: str, dtype: str) -> str:
    """The name of the implementation that serves this model here unless the user names one."""
    if platform == "cpu":
        return "xla"
    tpu_serves = model.head_width % 64 == 0 and dtype in ("float32", "bfloat16")
    return "tpu" if platform == "tpu" and tpu_serves else "xla_wide"
