"""The training forward pass: Llama's arithmetic on whole sequences, in float32.

It has no code in common with the engine on purpose, so that it is an independent check of the
shipped weights. Axis letters are as in `jinfer/axes.py`, except that B counts sequences and T
counts positions in each sequence.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]  # "embed_VD", "final_norm_D", and "layers": a list of dicts


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama model. Hashable: jit takes it as a static argument."""

    vocab_size: int  # V
    width: int  # D
    num_layers: int  # L
    num_q_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    ffn_width: int  # F
    max_positions: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


def init_params(key: jax.Array, shape: Shape) -> Params:
    """Makes random weights with fan-in scaling; projections into the residual are zero."""
    d, f, h = shape.width, shape.ffn_width, shape.head_width
    q_width, kv_width = shape.num_q_heads * h, shape.num_kv_heads * h
    embed_key, *layer_keys = jax.random.split(key, shape.num_layers + 1)

    def matrix(key, rows, columns):
        return jax.random.normal(key, (rows, columns)) * (0.6 / rows**0.5)

    def layer(key):
        keys = jax.random.split(key, 5)
        return {
            "attn_norm_D": jnp.ones(d),
            "q_DC": matrix(keys[0], d, q_width),  # C: all heads side by side
            "k_DC": matrix(keys[1], d, kv_width),
            "v_DC": matrix(keys[2], d, kv_width),
            "o_CD": jnp.zeros((q_width, d)),
            "ffn_norm_D": jnp.ones(d),
            "gate_DF": matrix(keys[3], d, f),
            "up_DF": matrix(keys[4], d, f),
            "down_FD": jnp.zeros((f, d)),
        }

    return {
        "embed_VD": 0.02 * jax.random.normal(embed_key, (shape.vocab_size, d)),
        "layers": [layer(key) for key in layer_keys],
        "final_norm_D": jnp.ones(d),
    }


def grow(params: Params, shape: Shape, num_layers: int) -> tuple[Params, Shape]:
    """Adds layers to a trained model without changing its output.

    Copies of each old layer follow it. Their projections into the residual are zero, so a copy
    adds nothing until it is trained.

    Source: block expansion, Wu et al., arXiv:2401.02415, section 3.1.
    """
    if num_layers % shape.num_layers:
        raise ValueError(
            f"num_layers must be a multiple of the model's {shape.num_layers}; got {num_layers=}."
        )

    def silent(layer: Params) -> Params:
        zeros = {name: jnp.zeros_like(layer[name]) for name in ("o_CD", "down_FD")}
        return {**jax.tree.map(jnp.copy, layer), **zeros}

    copies = num_layers // shape.num_layers - 1
    layers = [
        each
        for layer in params["layers"]
        for each in (layer, *(silent(layer) for _ in range(copies)))
    ]
    return {**params, "layers": layers}, replace(shape, num_layers=num_layers)


def num_params(params: Params) -> int:
    """Counts the weights; the tied embedding counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def rms_norm(hidden_BTD: jax.Array, scale_D: jax.Array, *, eps: float) -> jax.Array:
    mean_square_BT1 = jnp.mean(jnp.square(hidden_BTD), axis=-1, keepdims=True)
    return hidden_BTD * jax.lax.rsqrt(mean_square_BT1 + eps) * scale_D


def apply_rope(heads_BTKH: jax.Array, *, theta: float) -> jax.Array:
    """Rotates the pairs (i, i + H/2), Hugging Face's layout, by the position."""
    num_positions, head_width = heads_BTKH.shape[1], heads_BTKH.shape[-1]
    pair = jnp.arange(head_width // 2, dtype=jnp.float32)
    position_T = jnp.arange(num_positions, dtype=jnp.float32)
    angle_TH = position_T[:, None] * theta ** (-2.0 * pair / head_width)
    cos_TKH, sin_TKH = jnp.cos(angle_TH)[:, None, :], jnp.sin(angle_TH)[:, None, :]
    low, high = jnp.split(heads_BTKH, 2, axis=-1)
    return jnp.concatenate(
        [low * cos_TKH - high * sin_TKH, high * cos_TKH + low * sin_TKH], axis=-1
    )


def attention(layer: Params, hidden_BTD: jax.Array, *, shape: Shape) -> jax.Array:
    """Causal grouped-query attention; returns the update of the residual."""
    num_sequences, num_positions, _ = hidden_BTD.shape
    num_kv, head_width = shape.num_kv_heads, shape.head_width
    group = shape.num_q_heads // num_kv

    def heads(weight_DC):
        flat_BTC = hidden_BTD @ weight_DC
        return flat_BTC.reshape(num_sequences, num_positions, -1, head_width)

    q_BTNH = apply_rope(heads(layer["q_DC"]), theta=shape.rope_theta)
    k_BSKH = apply_rope(heads(layer["k_DC"]), theta=shape.rope_theta)
    v_BSKH = heads(layer["v_DC"])
    q_BTKGH = q_BTNH.reshape(num_sequences, num_positions, num_kv, group, head_width)
    score_BKTGS = jnp.einsum("BTKGH,BSKH->BKTGS", q_BTKGH * head_width**-0.5, k_BSKH)
    visible_TS = jnp.tril(jnp.ones((num_positions, num_positions), bool))
    score_BKTGS = jnp.where(visible_TS[:, None, :], score_BKTGS, -1e30)
    weight_BKTGS = jax.nn.softmax(score_BKTGS, axis=-1)
    mixed_BTKGH = jnp.einsum("BKTGS,BSKH->BTKGH", weight_BKTGS, v_BSKH)
    return mixed_BTKGH.reshape(num_sequences, num_positions, -1) @ layer["o_CD"]


def swiglu(layer: Params, hidden_BTD: jax.Array) -> jax.Array:
    gate_BTF = jax.nn.silu(hidden_BTD @ layer["gate_DF"])
    return (gate_BTF * (hidden_BTD @ layer["up_DF"])) @ layer["down_FD"]


def forward(params: Params, token_BT: jax.Array, *, shape: Shape) -> jax.Array:
    """Returns logits_BTV for every position."""
    hidden_BTD = params["embed_VD"][token_BT]
    for layer in params["layers"]:
        normed_BTD = rms_norm(hidden_BTD, layer["attn_norm_D"], eps=shape.norm_eps)
        hidden_BTD += attention(layer, normed_BTD, shape=shape)
        normed_BTD = rms_norm(hidden_BTD, layer["ffn_norm_D"], eps=shape.norm_eps)
        hidden_BTD += swiglu(layer, normed_BTD)
    hidden_BTD = rms_norm(hidden_BTD, params["final_norm_D"], eps=shape.norm_eps)
    return hidden_BTD @ params["embed_VD"].T


def token_losses(params: Params, token_BT: jax.Array, *, shape: Shape) -> jax.Array:
    """Negative log-likelihood in nats of each token after the first: [B, T - 1]."""
    logits_BTV = forward(params, token_BT[:, :-1], shape=shape)
    target_BT = token_BT[:, 1:]
    chosen_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT
