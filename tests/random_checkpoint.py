"""Writes small Llama checkpoints of random weights, laid out as Hugging Face does.

`from random_checkpoint import write_llama_checkpoint` works in every test: pyproject.toml puts
this folder on the path. The writer shares nothing with the reader in `jinfer.weights`.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
END_TOKEN_ID = 2

SMALL_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": END_TOKEN_ID,
}


def write_llama_checkpoint(
    folder: Path, *, seed: int, shards: int = 1, dtype: str = "float32", **overrides: Any
) -> Path:
    """Writes config.json, generation_config.json and safetensors, and returns `folder`.

    Args:
      folder: created if absent.
      seed: of the random weights; the same seed gives the same weights in every dtype, rounded.
      shards: number of safetensors files; more than one adds model.safetensors.index.json.
      dtype: "float32", "float16" or "bfloat16", as stored.
      **overrides: keys of config.json to set; a value of `...` removes the key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hf = {**SMALL_LLAMA, "dtype": dtype, **overrides}
    hf = {key: value for key, value in hf.items() if value is not ...}
    write_json(folder / "config.json", hf)
    write_json(folder / "generation_config.json", {"eos_token_id": hf.get("eos_token_id")})
    write_tensors(folder, random_llama_tensors(hf, seed=seed, dtype=dtype), shards=shards)
    return folder


def random_llama_tensors(
    hf: dict[str, Any], *, seed: int, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Every tensor of a Llama checkpoint by its Hugging Face name, as [out, in]."""
    rng = np.random.default_rng(seed)
    return {
        name: _draw(rng, name, shape).astype(DTYPES[dtype])
        for name, shape in llama_tensor_shapes(hf).items()
    }


def llama_tensor_shapes(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the order Hugging Face writes them."""
    width = hf["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (hf["vocab_size"], width)}
    for layer in range(hf["num_hidden_layers"]):
        for name, shape in _layer_shapes(hf).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (width,)
    if not hf.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (hf["vocab_size"], width)
    return shapes


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    """Writes one model.safetensors, or `shards` files and the index that names them."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        inside = names[shard::shards]  # neighbours apart, so that a layer spans files
        save_file({name: tensors[name] for name in inside}, folder / file_name)
        weight_map.update(dict.fromkeys(inside, file_name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _layer_shapes(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, intermediate_size = hf["hidden_size"], hf["intermediate_size"]
    head_dim = hf.get("head_dim") or width // hf["num_attention_heads"]
    q_width = hf["num_attention_heads"] * head_dim
    kv_width = hf.get("num_key_value_heads", hf["num_attention_heads"]) * head_dim
    attention = {
        "q": (q_width, width),
        "k": (kv_width, width),
        "v": (kv_width, width),
        "o": (width, q_width),
    }
    mlp = {
        "gate": (intermediate_size, width),
        "up": (intermediate_size, width),
        "down": (width, intermediate_size),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    for part, bias_key, matrices in (
        ("self_attn", "attention_bias", attention),
        ("mlp", "mlp_bias", mlp),
    ):
        for name, (rows, columns) in matrices.items():
            shapes[f"{part}.{name}_proj.weight"] = (rows, columns)
            if hf.get(bias_key, False):
                shapes[f"{part}.{name}_proj.bias"] = (rows,)
    return shapes


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norm weights around one, biases small, matrices with fan-in scaling."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1.0 + 0.1 * noise
    if name.endswith(".bias"):
        return 0.1 * noise
    return noise / np.float32(shape[-1]) ** 0.5
