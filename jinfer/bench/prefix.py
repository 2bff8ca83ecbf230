"""What the prefix cache saves where prompts begin alike, and what it costs where none does.

    python -m jinfer.bench.prefix

Two engines of the same shape and weights in one process, one with the cache, taking turns; so a
machine whose speed drifts slows both. Random weights: the time of a step does not depend on them.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from jinfer.bench.models import SHAPE_125M
from jinfer.llm import LLM
from jinfer.request.params import SamplingParams

ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


def make_llms(max_model_len: int) -> dict[bool, LLM]:
    """An LLM with the prefix cache and one without."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape = {**SHAPE_125M, "max_position_embeddings": max_model_len}
        (folder / "config.json").write_text(json.dumps(shape))
        return {
            cached: LLM(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_num_seqs=8,
                enable_prefix_caching=cached,
                late_compile="error",
            )
            for cached in (True, False)
        }


def first_token_s(llm: LLM, prompt: list[int]) -> float:
    """Seconds from submitting one prompt to its first token."""
    [output] = llm.generate([prompt], ONE_TOKEN, use_tqdm=False)
    assert output.metrics.ttft_s is not None
    return output.metrics.ttft_s


def compare_shared(llms: dict[bool, LLM], args: argparse.Namespace) -> dict[bool, float]:
    """Median TTFT in seconds of prompts that share all but their last tokens."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 32_000, size=args.shared_tokens).tolist()
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(args.repeats + 1):
        prompt = shared + rng.integers(3, 32_000, size=args.fresh_tokens).tolist()
        for cached, llm in llms.items():
            times[cached].append(first_token_s(llm, prompt))
    return {cached: statistics.median(each[1:]) for cached, each in times.items()}


def compare_unshared(llms: dict[bool, LLM], args: argparse.Namespace) -> float:
    """Median over pairs of the time with the cache over the time without, at no hit."""
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    ratios = []
    for pair in range(args.repeats + 1):
        prompts = rng.integers(3, 32_000, size=(8, 64)).tolist()
        elapsed_s = {}
        for cached in (True, False) if pair % 2 else (False, True):
            start_s = time.perf_counter()
            outputs = llms[cached].generate(prompts, params, use_tqdm=False)
            elapsed_s[cached] = time.perf_counter() - start_s
            assert not any(output.num_cached_tokens for output in outputs)
        ratios.append(elapsed_s[True] / elapsed_s[False])
    return statistics.median(ratios[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="The prefix cache: what it saves and costs.")
    parser.add_argument("--shared-tokens", type=int, default=2000)
    parser.add_argument("--fresh-tokens", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    llms = make_llms(args.shared_tokens + args.fresh_tokens + 64)
    ttft_s = compare_shared(llms, args)
    print(
        f"{args.shared_tokens} shared and {args.fresh_tokens} fresh tokens, time to first token: "
        f"{ttft_s[False] * 1e3:.0f} ms without the cache, {ttft_s[True] * 1e3:.0f} ms with it, "
        f"{ttft_s[False] / ttft_s[True]:.1f} times better"
    )
    print(f"no prefix in common: {compare_unshared(llms, args):.4f} of the time without the cache")


if __name__ == "__main__":
    main()
