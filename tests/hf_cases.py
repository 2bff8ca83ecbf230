"""Random Llama checkpoints on which jinfer must equal Hugging Face; shared by goldens and tests."""

from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import write_llama_checkpoint

from jinfer.request.tokenizer import load_tokenizer
from jinfer.shipped import draft_folder, target_folder

NUM_GREEDY_TOKENS = 64
GOLDENS = Path(__file__).parent / "models" / "hf_goldens.npz"

_BASE = {"hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 512}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Overrides of config.json, by case name.
CASES: dict[str, dict[str, Any]] = {
    "gqa1_width64": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64},
    "gqa4_width64_tied": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "gqa8_width128": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128},
    "gqa4_width128_llama3": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_scaling": _LLAMA3,
        "rope_theta": 500_000.0,
    },
    "gqa2_linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "gqa2_all_biases": {"attention_bias": True, "mlp_bias": True},
}

SHIPPED = {"shipped_target": target_folder(), "shipped_draft": draft_folder()}
SHIPPED_PROMPT = "Once upon a time there was a king who had three daughters, and the youngest"


def write_case(folder: Path, name: str) -> Path:
    """Writes the checkpoint of a case; the same bytes on every machine."""
    return write_llama_checkpoint(folder / name, seed=len(name), **{**_BASE, **CASES[name]})


def prompt_of(name: str) -> list[int]:
    """40 token ids in [3, 128): past the end token, and crossing pages of 16."""
    return np.random.default_rng(sum(map(ord, name))).integers(3, 128, size=40).tolist()


def shipped_prompt_ids(folder: Path) -> list[int]:
    """SHIPPED_PROMPT in the tokens of a shipped model."""
    return load_tokenizer(folder).encode(SHIPPED_PROMPT)
