"""jinfer beside `transformers.generate`: same shape, same prompts, one process, taking turns.

    python -m jinfer.bench.compare --prompts 1 8 32

Needs the `agreement` extra. Random weights: the speed of a greedy step does not depend on them.
Runs alternate, so that a machine whose speed drifts slows both; read the ratio, not the rates.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jinfer.llm import LLM
from jinfer.request.params import SamplingParams

# A Llama of 125 million parameters and its embeddings.
SHAPE_125M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Run = Callable[[np.ndarray], None]  # prompts [num_prompts, num_input_tokens] -> nothing


def jinfer_run(folder: Path, num_output_tokens: int, max_model_len: int) -> Run:
    """Loads the shape into jinfer; the result answers a batch of prompts greedily."""
    llm = LLM(
        folder,
        load_format="dummy",
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        late_compile="error",
    )
    params = SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True)

    def run(prompt_BT: np.ndarray) -> None:
        outputs = llm.generate(prompt_BT.tolist(), params, use_tqdm=False)
        assert all(len(o.outputs[0].token_ids) == num_output_tokens for o in outputs)

    return run


def transformers_run(folder: Path, num_output_tokens: int) -> Run:
    """The same in transformers, on as many threads as there are processors."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        AutoConfig,
        AutoModelForCausalLM,
    )

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()

    @torch.no_grad()
    def run(prompt_BT: np.ndarray) -> None:
        model.generate(
            torch.tensor(prompt_BT),
            max_new_tokens=num_output_tokens,
            min_new_tokens=num_output_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    return run


def measure(runs: dict[str, Run], prompt_BT: np.ndarray, repeats: int) -> dict[str, float]:
    """Median seconds of each run, after one of each that does not count."""
    elapsed_s: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start_s = time.perf_counter()
            run(prompt_BT)
            elapsed_s[name].append(time.perf_counter() - start_s)
    return {name: statistics.median(times[1:]) for name, times in elapsed_s.items()}


def versions() -> str:
    """What the figures belong to."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, "
        f"Python {platform.python_version()}, jax {jax.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="jinfer beside transformers.generate.")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(SHAPE_125M))
        context = args.input_tokens + args.output_tokens
        runs = {
            "jinfer": jinfer_run(folder, args.output_tokens, context),
            "transformers": transformers_run(folder, args.output_tokens),
        }
        print(f"{versions()}\n125M Llama shape, float32, {args.input_tokens} tokens in, ", end="")
        print(f"{args.output_tokens} out; median of {args.repeats}; output tokens per second\n")
        print("| prompts | jinfer | transformers.generate | ratio |\n|---|---|---|---|")
        for num_prompts in args.prompts:
            prompt_BT = rng.integers(3, 32_000, size=(num_prompts, args.input_tokens))
            median_s = measure(runs, prompt_BT, args.repeats)
            num_tokens = num_prompts * args.output_tokens
            mine, theirs = (num_tokens / median_s[name] for name in runs)
            print(
                f"| {num_prompts} | {mine:.1f} | {theirs:.1f} | {mine / theirs:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
