"""One decoder for every family: nnx modules own the parameters, pure functions run them.

The modules exist only as graph definitions, made once. Parameters live in a plain nested
dict whose keys are the modules' attribute names; every jitted function takes that dict:

    {"embed_VD": ..., "blocks": ..., "final_norm_D": ..., "lm_head_VD": ...}

`blocks` is a list with one dict per layer (unrolled layer loop), or one dict whose leaves have a
leading L axis (scanned layer loop). A parameter's name ends in its axes; a matrix has its outputs
first, as in checkpoints. A decoder with tied embeddings has no `lm_head_VD`.

On several chips, each runs the same functions on its shard of the heads, of intermediate_size and
of the vocabulary. Every layer does two all-reduces, and no other communication. A reduce-scatter
with an all-gather is no better: compiled for v6e:2x4, it did not overlap with compute either, and
at 16 rows it became an all-reduce and an all-gather.
Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jinfer.config import ModelConfig
from jinfer.models.layers import project, rms_norm, rope_tables, rotate
from jinfer.parallel.collectives import WHOLE, Shards

Params = dict[str, Any]
Cache = Any  # the value that `attend` carries from layer to layer
# (q_TNH, k_TKH, v_TKH, cache, layer) -> (out_TNH, cache). It writes the new keys and values,
# then attends. The step provides it, so the model does not depend on pages.
Attend = Callable[[Array, Array, Array, Cache, Any], tuple[Array, Cache]]


class Block(nnx.Module):
    """One layer: grouped-query attention, then a gated MLP; a norm precedes each."""

    def __init__(self, config: ModelConfig, shards: Shards) -> None:
        D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
        N, K = config.num_q_heads, config.num_kv_heads
        self.config, self.shards = config, shards
        self.attn_norm_D = _parameter(D)
        self.w_qkv_UD = _parameter((N + 2 * K) * H, D)
        self.w_o_DQ = _parameter(D, N * H)
        self.mlp_norm_D = _parameter(D)
        self.w_gate_up_YD = _parameter(2 * F, D)
        self.w_down_DF = _parameter(D, F)
        if config.attention_bias:
            self.b_q_NH = _parameter(N, H)
            self.b_k_KH = _parameter(K, H)
            self.b_v_KH = _parameter(K, H)
            self.b_o_D = _parameter(D)
        if config.mlp_bias:
            self.b_gate_F = _parameter(F)
            self.b_up_F = _parameter(F)
            self.b_down_D = _parameter(D)

    def __call__(
        self,
        hidden_TD: Float[Array, "T D"],
        rope: tuple[Array, Array],
        attend: Attend,
        cache: Cache,
        layer: Any,
    ) -> tuple[Float[Array, "T D"], Cache]:
        eps = self.config.rms_norm_eps
        with jax.named_scope("attention"):
            normed_TD = rms_norm(hidden_TD, self.attn_norm_D[...], eps=eps)
            mixed_TD, cache = self._attention(normed_TD, rope, attend, cache, layer)
            hidden_TD = hidden_TD + mixed_TD
        with jax.named_scope("mlp"):
            normed_TD = rms_norm(hidden_TD, self.mlp_norm_D[...], eps=eps)
            return hidden_TD + self._mlp(normed_TD), cache

    def _attention(
        self, normed_TD: Array, rope: tuple[Array, Array], attend: Attend, cache: Cache, layer: Any
    ) -> tuple[Array, Cache]:
        q_TNH, k_TKH, v_TKH = self._heads(normed_TD)
        if self.config.attention_bias:
            q_TNH = q_TNH + self.b_q_NH[...]
            k_TKH = k_TKH + self.b_k_KH[...]
            v_TKH = v_TKH + self.b_v_KH[...]
        out_TNH, cache = attend(rotate(q_TNH, *rope), rotate(k_TKH, *rope), v_TKH, cache, layer)
        out_TQ = out_TNH.reshape(len(out_TNH), -1)
        mixed_TD = self.shards.sum(project(out_TQ, self.w_o_DQ[...]))
        if self.config.attention_bias:
            mixed_TD = mixed_TD + self.b_o_D[...]
        return mixed_TD, cache

    def _heads(self, normed_TD: Array) -> list[Array]:
        """This chip's queries [T, N, H], and its keys and values [T, K, H]."""
        # With three matrices, inputs first, XLA for TPUs moved the split into heads back into the
        # weights. In a loop over steps it kept a transposed copy of all layers: 1.6 GB for 8B
        # parameters. The barrier prevents this; with one matrix it may be unnecessary (not tried).
        flat_TU = jax.lax.optimization_barrier(project(normed_TD, self.w_qkv_UD[...]))
        num_q = self.w_o_DQ.shape[1]  # Q of this chip; config has the total
        num_kv = (flat_TU.shape[1] - num_q) // 2
        parts = jnp.split(flat_TU, (num_q, num_q + num_kv), axis=1)  # q_TQ, k_TC, v_TC
        return [part.reshape(len(part), -1, self.config.head_dim) for part in parts]

    def _mlp(self, normed_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        gate_TF, up_TF = jnp.split(project(normed_TD, self.w_gate_up_YD[...]), 2, axis=1)
        if self.config.mlp_bias:
            gate_TF, up_TF = gate_TF + self.b_gate_F[...], up_TF + self.b_up_F[...]
        inner_TF = jax.nn.silu(gate_TF) * up_TF
        out_TD = self.shards.sum(project(inner_TF, self.w_down_DF[...]))
        return out_TD + self.b_down_D[...] if self.config.mlp_bias else out_TD


class Ends(nnx.Module):
    """The embedding before the first block; the final norm and lm_head after the last."""

    def __init__(self, config: ModelConfig, shards: Shards) -> None:
        self.config, self.shards = config, shards
        self.embed_VD = _parameter(config.vocab_size, config.hidden_size)
        self.final_norm_D = _parameter(config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head_VD = _parameter(config.vocab_size, config.hidden_size)

    def embed(self, token_T: Int32[Array, "T"]) -> Float[Array, "T D"]:
        embed_VD = self.embed_VD[...]
        if self.shards.axis is None:
            return jnp.take(embed_VD, token_T, axis=0, mode="clip")
        local_T = self.shards.local(token_T, len(embed_VD))
        return self.shards.sum(jnp.take(embed_VD, local_T, axis=0, mode="fill", fill_value=0))

    def logits(self, hidden_RD: Float[Array, "R D"]) -> Float[Array, "R V"]:
        """Final norm and lm_head, in float32, for selected tokens; V is this shard's."""
        tied = self.config.tie_word_embeddings
        lm_head_VD = (self.embed_VD if tied else self.lm_head_VD)[...]
        normed_RD = rms_norm(hidden_RD, self.final_norm_D[...], eps=self.config.rms_norm_eps)
        logits_RV = project(normed_RD, lm_head_VD, dtype=jnp.float32)
        return self._without_filling(logits_RV)

    def _without_filling(self, logits_RV: Array) -> Array:
        """Sets the logits of the padded vocabulary to -inf."""
        length = logits_RV.shape[-1]
        if self.shards.whole(length) == self.config.vocab_size:
            return logits_RV
        id_V = self.shards.start(length) + jnp.arange(length)
        return jnp.where(id_V < self.config.vocab_size, logits_RV, -jnp.inf)


class Decoder:
    """The graph definitions of one model, and functions that run them on parameters.

    Args:
      config: of the checkpoint: not padded, not sharded.
      shards: the shards of the model; the functions run on one of them.
    """

    def __init__(self, config: ModelConfig, shards: Shards = WHOLE) -> None:
        self.config, self.shards = config, shards
        self._block_graph, block = nnx.split(nnx.eval_shape(lambda: Block(config, shards)))
        self._ends_graph, ends = nnx.split(nnx.eval_shape(lambda: Ends(config, shards)))
        self.block_shapes: dict[str, jax.ShapeDtypeStruct] = nnx.to_pure_dict(block)
        self.ends_shapes: dict[str, jax.ShapeDtypeStruct] = nnx.to_pure_dict(ends)

    def __repr__(self) -> str:  # complete: part of the key of compiled programs
        return f"Decoder({self.config!r}, {self.shards!r})"

    def hidden(
        self,
        params: Params,
        token_T: Int32[Array, "T"],
        position_T: Int32[Array, "T"],
        attend: Attend,
        cache: Cache,
    ) -> tuple[Float[Array, "T D"], Cache]:
        """Runs every layer; returns the output of the last one, before the final norm."""
        with jax.named_scope("embed"):
            hidden_TD = self._ends(params).embed(token_T)
        rope = rope_tables(position_T, self.config)

        def run(carry: tuple[Array, Cache], block: Params, layer: Any) -> tuple[Array, Cache]:
            hidden_TD, cache = carry
            module = nnx.merge(self._block_graph, nnx.State(block))
            return module(hidden_TD, rope, attend, cache, layer)

        carry = (hidden_TD, cache)
        if isinstance(params["blocks"], list):
            # Traced once for all layers; XLA inlines it at each call.
            run_once = jax.jit(run)
            for number, block in enumerate(params["blocks"]):
                # On GPUs, a constant would make XLA compile separate kernels for each layer.
                layer = jax.lax.optimization_barrier(jnp.int32(number))
                carry = run_once(carry, block, layer)
            return carry
        layer_L = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        carry, _ = jax.lax.scan(
            lambda carry, x: (run(carry, *x), None), carry, (params["blocks"], layer_L)
        )
        return carry

    def logits(self, params: Params, hidden_RD: Float[Array, "R D"]) -> Float[Array, "R V"]:
        with jax.named_scope("logits"):
            return self._ends(params).logits(hidden_RD)

    def _ends(self, params: Params) -> Ends:
        own = {name: params[name] for name in self.ends_shapes}
        return nnx.merge(self._ends_graph, nnx.State(own))


def _parameter(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))
