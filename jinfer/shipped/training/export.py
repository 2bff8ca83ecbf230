"""Writes trained weights as a Hugging Face Llama folder, and reads them back."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import sentencepiece
import tokenizers
from safetensors.numpy import load_file, save

from jinfer.shipped.training.model import Params, Shape

# Our name of a layer's tensor -> the checkpoint's. Checkpoints store matrices as [out, in].
_LAYER_NAMES = {
    "attn_norm_D": "input_layernorm",
    "q_DC": "self_attn.q_proj",
    "k_DC": "self_attn.k_proj",
    "v_DC": "self_attn.v_proj",
    "o_CD": "self_attn.o_proj",
    "ffn_norm_D": "post_attention_layernorm",
    "gate_DF": "mlp.gate_proj",
    "up_DF": "mlp.up_proj",
    "down_FD": "mlp.down_proj",
}

# A story model has no roles: messages become paragraphs, a system message too. If the last message
# stops in the middle of a sentence, the model goes on with that sentence.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages if message['role'] != 'system' or message['content'] | trim -%}"
    "{{ message['content'] | trim }}"
    "{%- if not loop.last or (add_generation_prompt and (message['content'] | trim)[-1:] "
    "in ['.', '!', '?', '\"', ':']) -%}"
    "{{ '\\n\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def export_folder(folder: Path, params: Params, shape: Shape, tokenizer_model: bytes) -> None:
    """Writes every file of the folder; each is renamed into place when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    fast = fast_tokenizer(tokenizer_model)
    _write(folder / "config.json", _json(model_config(shape)))
    _write(folder / "generation_config.json", _json(generation_config()))
    _write(folder / "tokenizer_config.json", _json(tokenizer_config(shape)))
    _write(folder / "tokenizer.model", tokenizer_model)
    _write(folder / "tokenizer.json", fast.to_str(pretty=False).encode())
    tensors = {
        name: np.ascontiguousarray(np.asarray(tensor).astype(ml_dtypes.bfloat16))
        for name, tensor in to_checkpoint(params).items()
    }
    _write(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))


def load_folder(folder: Path) -> tuple[Params, Shape]:
    """Reads the weights back, as float32."""
    hf = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_q_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_width=hf["head_dim"],
        ffn_width=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        rope_theta=hf["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
    )
    tensors = load_file(folder / "model.safetensors")
    return from_checkpoint(tensors, num_layers=shape.num_layers), shape


def to_checkpoint(params: Params) -> dict[str, jax.Array]:
    """Renames and transposes our parameters for the checkpoint."""
    tensors = {
        "model.embed_tokens.weight": params["embed_VD"],
        "model.norm.weight": params["final_norm_D"],
    }
    for index, layer in enumerate(params["layers"]):
        for ours, theirs in _LAYER_NAMES.items():
            tensors[f"model.layers.{index}.{theirs}.weight"] = layer[ours].T
    return tensors


def from_checkpoint(tensors: dict[str, np.ndarray], *, num_layers: int) -> Params:
    """Inverse of `to_checkpoint`, in float32."""

    def read(name: str) -> jax.Array:
        return jnp.asarray(np.asarray(tensors[f"{name}.weight"]).astype(np.float32))

    return {
        "embed_VD": read("model.embed_tokens"),
        "final_norm_D": read("model.norm"),
        "layers": [
            {ours: read(f"model.layers.{i}.{theirs}").T for ours, theirs in _LAYER_NAMES.items()}
            for i in range(num_layers)
        ],
    }


def model_config(shape: Shape) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn_width,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_q_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def generation_config() -> dict:
    return {
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": 2,
        "temperature": 0.6,
        "top_p": 0.95,
    }


def tokenizer_config(shape: Shape) -> dict:
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": content, **special, "special": True}
            for index, content in enumerate(("<unk>", "<s>", "</s>"))
        },
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": shape.max_positions,
        "pad_token": None,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }


def fast_tokenizer(tokenizer_model: bytes) -> tokenizers.Tokenizer:
    """Returns the same BPE in the `tokenizers` format.

    SentencePiece merges the adjacent pair whose union has the lowest id. A merge list in the order
    of these ids does the same, if it has every way to split a piece into two pieces.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = []
    for piece, index in vocab.items():
        if pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index):
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        splits = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")]
    )
    fast.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    fast.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return fast


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
