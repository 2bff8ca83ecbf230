"""Model shapes to benchmark with random weights, without a checkpoint."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A Llama of 125 million parameters and its embeddings.
SHAPE_125M: dict[str, Any] = {
    **_LLAMA,
    "vocab_size": 32_000,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
# Llama 3 8B.
SHAPE_8B: dict[str, Any] = {
    **_LLAMA,
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
SHAPES = {"125m": SHAPE_125M, "8b": SHAPE_8B}


@contextmanager
def model_arguments(name: str) -> Iterator[dict[str, Any]]:
    """Keywords of LLM for a shape's name, a shipped model, a folder or a hub name.

    A shape's folder exists within the context only.
    """
    if name not in SHAPES:
        yield {"model": name, "skip_tokenizer_init": True}
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[name]))
        yield {"model": folder, "skip_tokenizer_init": True, "load_format": "dummy"}
