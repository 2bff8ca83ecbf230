"""Paged-attention implementations by name. One is chosen at start-up."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jinfer.config import EnginePlan, ModelConfig
from jinfer.step.kv_cache import pages_shape
from kernels_pallas.paged_attention import gpu, tpu
from kernels_pallas.paged_attention.pages import LARGEST
from kernels_pallas.paged_attention.xla import paged_attention_xla

# The contract: kernels_pallas/paged_attention/contract.py.
ATTENTION: dict[str, Callable[..., Any]] = {
    "xla": paged_attention_xla,  # portable; one query tile at a time suits a CPU
    # The same for GPU and TPU. After each block a GPU asks the host whether there is another, about
    # 20 us, so blocks are large: 512 keys give 16 blocks for a context of 8k, where 64 keys would
    # give 128. With 1024 keys, the temporaries of an 8B step would be 402 MB instead of 230, and
    # short rows would read twice as many masked keys.
    "xla_wide": partial(paged_attention_xla, tiles_at_once=32, block_tokens=512),
    "tpu": tpu.paged_attention_tpu,
    "gpu": gpu.paged_attention_gpu,  # Hopper and Blackwell; no default until it has run on one
    # The kernels simulated on a CPU: slow, to tell whether a kernel or its compiler is wrong.
    "tpu_interpret": partial(tpu.paged_attention_tpu, interpret=pltpu.InterpretParams()),
    "gpu_interpret": partial(gpu.paged_attention_gpu, interpret=True),
}


def default_attention(model: ModelConfig, *, platform: str, dtype: str) -> str:
    """The name of the implementation for this model and platform, unless the user names one."""
    if platform == "cpu":
        return "xla"
    # Narrow heads would leave more than half of each page empty.
    fits = stored_head_dim("tpu", model.head_dim) <= 2 * model.head_dim
    return "tpu" if platform == "tpu" and fits and dtype in tpu.DTYPES else "xla_wide"


def stored_head_dim(attention: str, head_dim: int) -> int:
    """The head_dim of the pool for this implementation: the model's, or padded with zeros."""
    kernels = {"tpu": tpu, "gpu": gpu}
    kernel = kernels.get(attention.removesuffix("_interpret"))
    return kernel.stored_head_dim(head_dim) if kernel else head_dim


def require_served(plan: EnginePlan, shard: ModelConfig) -> None:
    """Lets the chosen implementation reject the plan's shapes before any weight is read.

    Args:
      plan: names the implementation.
      shard: one chip's shard of the model, with that chip's heads.

    Raises:
      NotImplementedError: it does not support the platform, a dtype or a size.
    """
    if plan.attention == "tpu" and plan.platform != "tpu":
        raise NotImplementedError(
            f"attention='tpu' needs a TPU; got platform={plan.platform!r}. Leave attention out."
        )
    if plan.attention == "tpu" and plan.kv_dtype in LARGEST and plan.page_size % 128:
        # XLA stores these scales without gaps, but the kernel needs whole rows of 128. Each
        # dispatch would copy all scales there and back, in memory that the plan does not count.
        raise NotImplementedError(
            "on TPU, 8-bit pages hold a multiple of 128 tokens; "
            f"got page_size={plan.page_size}. Leave page_size out, or choose a multiple of 128."
        )
    num_tokens, num_rows, width = plan.max_step_tokens, plan.max_slots, shard.head_dim
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    q_TNH, kv_TKH = (
        jax.ShapeDtypeStruct((num_tokens, num_heads, width), plan.dtype)
        for num_heads in (shard.num_q_heads, shard.num_kv_heads)
    )
    pages = pages_shape(
        shard,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        dtype=plan.kv_dtype,
        head_dim=plan.kv_head_dim,
    )
    rows = (int32((num_rows, plan.pages_per_slot)), *[int32((num_rows,))] * 3)
    attend = partial(ATTENTION[plan.attention], scale=width**-0.5)
    jax.eval_shape(attend, q_TNH, kv_TKH, kv_TKH, pages, int32(()), *rows)
