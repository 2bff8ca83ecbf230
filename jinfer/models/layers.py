"""The parts of a transformer layer, as pure functions on packed tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jinfer.config import ModelConfig, RopeScaling

# Up to this many tokens, XLA's matmuls on CPUs are faster with the weights as the left operand; at
# 1 and at 256 tokens they are not slower: jinfer/bench/results/2026-11-26-cpu-125m-zen4.md.
FEW_TOKENS = 256


def rms_norm(
    hidden_TD: Float[Array, "T D"], scale_D: Float[Array, "D"], *, eps: float
) -> Float[Array, "T D"]:
    """Divides each token's vector by its root mean square and scales it.

    Computed in float32 and rounded to the input's dtype before scaling, as in Hugging Face.

    Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.
    """
    wide_TD = hidden_TD.astype(jnp.float32)
    inv_rms_T1 = jax.lax.rsqrt(jnp.mean(jnp.square(wide_TD), axis=-1, keepdims=True) + eps)
    return (wide_TD * inv_rms_T1).astype(hidden_TD.dtype) * scale_D


def project(
    x_TD: Float[Array, "T D"], weight_CD: Float[Array, "C D"], *, dtype: DTypeLike | None = None
) -> Float[Array, "T C"]:
    """Multiplies each token's vector by a matrix stored outputs first, as in checkpoints.

    Args:
      x_TD: any float dtype; here D is any input width, and C any output width.
      weight_CD: the same dtype.
      dtype: dtype of the result; None = that of x_TD.
    """
    tokens_first = partial(_tokens_first, dtype=dtype)
    if x_TD.shape[0] > FEW_TOKENS:
        return tokens_first(x_TD, weight_CD)
    weight_first = partial(_weight_first, dtype=dtype)
    return jax.lax.platform_dependent(x_TD, weight_CD, cpu=weight_first, default=tokens_first)


def _tokens_first(x_TD: Array, weight_CD: Array, *, dtype: DTypeLike | None) -> Array:
    return jnp.einsum("TD,CD->TC", x_TD, weight_CD, preferred_element_type=dtype)


def _weight_first(x_TD: Array, weight_CD: Array, *, dtype: DTypeLike | None) -> Array:
    product_CT = jnp.einsum("CD,TD->CT", weight_CD, x_TD, preferred_element_type=dtype)
    # Without the barrier XLA swaps the operands back, and the speed-up is lost.
    return jax.lax.optimization_barrier(product_CT).T


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each rotary pair, float32 [H / 2], after any rope scaling.

    Source: Su et al., RoFormer, arXiv:2104.09864, section 3.2.2; scaling: see RopeScaling.
    """
    pair = np.arange(0, config.head_dim, 2, dtype=np.float32)
    frequency = 1.0 / config.rope_theta ** (pair / np.float32(config.head_dim))
    if config.rope_scaling is None:
        return frequency.astype(np.float32)
    if config.rope_scaling.kind == "linear":
        return (frequency / config.rope_scaling.factor).astype(np.float32)
    return _llama3_frequencies(frequency, config.rope_scaling)


def _llama3_frequencies(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    # Wavelengths beyond the trained context are stretched by `factor`. Short ones are kept.
    # Wavelengths in between are blended linearly in (context / wavelength).
    turns = scaling.original_max_position_embeddings * frequency / (2 * np.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (frequency * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def rope_tables(
    position_T: Int32[Array, "T"], config: ModelConfig
) -> tuple[Float[Array, "T 1 H2"], Float[Array, "T 1 H2"]]:
    """Cosine and sine of every token's angles, float32, computed once per step.

    float32 on purpose: bfloat16 keeps 8 significant bits, so positions past 256 collide.
    """
    angle = position_T[:, None, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x_TNH: Float[Array, "T N H"],
    cos_T1H2: Float[Array, "T 1 H2"],
    sin_T1H2: Float[Array, "T 1 H2"],
) -> Float[Array, "T N H"]:
    """Rotates each head's pairs (i, i + H/2), the layout of Hugging Face checkpoints."""
    lo, hi = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    rotated = (lo * cos_T1H2 - hi * sin_T1H2, hi * cos_T1H2 + lo * sin_T1H2)
    return jnp.concatenate(rotated, axis=-1).astype(x_TNH.dtype)
