"""The Llama family: how to read its config.json, and the names of its tensors.

Source: Touvron et al., Llama, arXiv:2302.13971; tensor names as transformers writes them.
"""

from collections.abc import Mapping
from typing import Any

from jinfer.config import ModelConfig
from jinfer.models.hf_config import optional, refuse_unsupported, required, rope_settings
from jinfer.models.weight_map import HFTensor, WeightMap, axis_sizes

BLOCK = {
    "attn_norm_D": HFTensor("input_layernorm.weight", "D"),
    "w_q_QD": HFTensor("self_attn.q_proj.weight", "Q D"),
    "w_k_CD": HFTensor("self_attn.k_proj.weight", "C D"),
    "w_v_CD": HFTensor("self_attn.v_proj.weight", "C D"),
    "w_o_DQ": HFTensor("self_attn.o_proj.weight", "D Q"),
    "mlp_norm_D": HFTensor("post_attention_layernorm.weight", "D"),
    "w_gate_FD": HFTensor("mlp.gate_proj.weight", "F D"),
    "w_up_FD": HFTensor("mlp.up_proj.weight", "F D"),
    "w_down_DF": HFTensor("mlp.down_proj.weight", "D F"),
}
ATTENTION_BIAS = {
    "b_q_NH": HFTensor("self_attn.q_proj.bias", "NH"),
    "b_k_KH": HFTensor("self_attn.k_proj.bias", "KH"),
    "b_v_KH": HFTensor("self_attn.v_proj.bias", "KH"),
    "b_o_D": HFTensor("self_attn.o_proj.bias", "D"),
}
MLP_BIAS = {
    "b_gate_F": HFTensor("mlp.gate_proj.bias", "F"),
    "b_up_F": HFTensor("mlp.up_proj.bias", "F"),
    "b_down_D": HFTensor("mlp.down_proj.bias", "D"),
}
LM_HEAD = HFTensor("lm_head.weight", "V D")
CONFIG_KEYS = frozenset(
    {
        "attention_bias",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads config.json of a LlamaForCausalLM, in the format of any transformers since 4.28.

    Raises:
      CheckpointError: if a key is missing or of the wrong type.
      NotImplementedError: the rope type, activation or storage format is not supported.
    """
    refuse_unsupported(hf)
    hidden_size, num_q_heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    rope_theta, rope_scaling = rope_settings(hf)
    hidden_act = required(hf, "hidden_act", str)
    if hidden_act != "silu":
        raise NotImplementedError(
            f"a Llama's activation must be 'silu'; got hidden_act={hidden_act!r}. "
            "Use another checkpoint."
        )
    return ModelConfig(
        family="llama",
        vocab_size=required(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=required(hf, "intermediate_size"),
        num_layers=required(hf, "num_hidden_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=optional(hf, "num_key_value_heads", num_q_heads),
        head_dim=optional(hf, "head_dim", hidden_size // num_q_heads),
        max_position_embeddings=required(hf, "max_position_embeddings"),
        rms_norm_eps=required(hf, "rms_norm_eps", float),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention_bias=optional(hf, "attention_bias", False, bool),
        mlp_bias=optional(hf, "mlp_bias", False, bool),
        tie_word_embeddings=optional(hf, "tie_word_embeddings", False, bool),
    )


def weight_map(config: ModelConfig) -> WeightMap:
    """Maps each parameter to its stored tensor and stored axes."""
    outer = {
        "embed_VD": HFTensor("model.embed_tokens.weight", "V D"),
        "final_norm_D": HFTensor("model.norm.weight", "D"),
    }
    if not config.tie_word_embeddings:
        outer["lm_head_VD"] = LM_HEAD
    block = dict(BLOCK)
    block |= ATTENTION_BIAS if config.attention_bias else {}
    block |= MLP_BIAS if config.mlp_bias else {}
    return WeightMap(
        outer=outer,
        block={leaf: _in_layer(tensor) for leaf, tensor in block.items()},
        axis_sizes=axis_sizes(config),
        ignored=_ignored(config),
    )


def _in_layer(tensor: HFTensor) -> HFTensor:
    return tensor._replace(name="model.layers.{layer}." + tensor.name)


def _ignored(config: ModelConfig) -> frozenset[str]:
    """Rope frequencies, which old versions saved, and lm_head if it is tied to the embedding."""
    names = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.num_layers)
    }
    return frozenset(names | ({LM_HEAD.name} if config.tie_word_embeddings else set()))
