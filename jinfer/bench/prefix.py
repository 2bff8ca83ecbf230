"""Measures the prefix cache: its savings with a shared prefix, and its cost without one.

    python -m jinfer.bench.prefix

Savings: two engines of the same shape and weights in one process, one with the cache, alternate, so
that a machine whose speed drifts slows both. Weights are random, since they do not change the time
of a step. Cost: one engine has the cache on in every other round, since two equal engines differ by
more than the cost. It runs the shipped model, which is so small that the host's work dominates.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jinfer.bench.models import SHAPE_125M
from jinfer.engine.engine import Engine
from jinfer.engine.pacing import Pacing
from jinfer.llm import LLM
from jinfer.request.params import SamplingParams
from jinfer.schedule.make import make_scheduler
from jinfer.schedule.scheduler import Scheduler

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
    """Median TTFT, in seconds, of prompts that share all but their last tokens."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 32_000, size=args.shared_tokens).tolist()
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(args.repeats + 1):
        prompt = shared + rng.integers(3, 32_000, size=args.fresh_tokens).tolist()
        for cached, llm in llms.items():
            times[cached].append(first_token_s(llm, prompt))
    return {cached: statistics.median(each[1:]) for cached, each in times.items()}


@dataclass(frozen=True)
class Round:
    """The times of one round of prompts."""

    elapsed_s: float
    cpu_s: float  # of all threads, so other programs on the machine do not count
    scheduler_s: float  # part of `cpu_s`: the engine's thread within its scheduler


def compare_unshared(llm: LLM, num_pairs: int) -> list[tuple[Round, Round]]:
    """Pairs of rounds with and without the cache, without any hit.

    One engine alternates between two schedulers, so that programs, weights and the pool are the
    same. Each scheduler overwrites the other's pages, which does no harm: no prompt repeats.
    """
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    engine = llm.engine
    assert isinstance(engine, Engine), f"replicas have a scheduler each: {engine.config=}"
    pace = Pacing(engine.config, engine.plan).pace
    schedulers = {
        cached: make_scheduler(engine.plan, pace, prefix_caching=cached) for cached in (True, False)
    }
    clocks = {cached: Clock(scheduler) for cached, scheduler in schedulers.items()}
    pairs = []
    for pair in range(num_pairs + 1):
        rounds = {}
        for cached in (True, False) if pair % 2 else (False, True):
            prompts = rng.integers(3, engine.model.vocab_size, size=(8, 64)).tolist()
            engine.scheduler, clock = schedulers[cached], clocks[cached]
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            scheduler_s = clock.elapsed_s
            outputs = llm.generate(prompts, params, use_tqdm=False)
            rounds[cached] = Round(
                elapsed_s=time.perf_counter() - start_s,
                cpu_s=time.process_time() - start_cpu_s,
                scheduler_s=clock.elapsed_s - scheduler_s,
            )
            assert not any(output.num_cached_tokens for output in outputs)
        pairs.append((rounds[True], rounds[False]))
    return pairs[1:]  # the first pair warms up


class Clock:
    """Adds up the CPU time of the calling thread within a scheduler's methods."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.elapsed_s = 0.0
        for name in ("add", "plan", "commit", "finish"):
            setattr(scheduler, name, self._timed(getattr(scheduler, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start_s = time.thread_time()
            result = method(*args)
            self.elapsed_s += time.thread_time() - start_s
            return result

        return timed


def spread(ratios: Sequence[float]) -> str:
    """The mean and its 95 % confidence interval."""
    half = 1.96 * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return f"{statistics.mean(ratios):.4f} (+- {half:.4f})"


def unshared_text(pairs: Sequence[tuple[Round, Round]]) -> str:
    """Ratios of the pairs, and the scheduler's own time."""
    on_s, off_s = (
        statistics.median(each.scheduler_s for each in side) for side in zip(*pairs, strict=True)
    )
    cpu_s = statistics.median(without.cpu_s for _, without in pairs)
    return (
        f"no prefix in common, {len(pairs)} pairs, with the cache over without: "
        f"{spread([w.elapsed_s / wo.elapsed_s for w, wo in pairs])} of the time, "
        f"{spread([w.cpu_s / wo.cpu_s for w, wo in pairs])} of the CPU time; "
        f"scheduler {on_s * 1e3:.2f} ms against {off_s * 1e3:.2f} ms in a round of "
        f"{cpu_s * 1e3:.0f} ms of CPU time, {(on_s - off_s) / cpu_s:.3%} more"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The prefix cache: what it saves and costs.")
    parser.add_argument("--shared-tokens", type=int, default=2000)
    parser.add_argument("--fresh-tokens", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=200, help="rounds without a shared prefix")
    args = parser.parse_args()
    with LLM(skip_tokenizer_init=True, max_num_seqs=8, late_compile="error") as llm:
        print(unshared_text(compare_unshared(llm, args.pairs)))
    llms = make_llms(args.shared_tokens + args.fresh_tokens + 64)
    ttft_s = compare_shared(llms, args)
    print(
        f"{args.shared_tokens} shared and {args.fresh_tokens} fresh tokens, time to first token: "
        f"{ttft_s[False] * 1e3:.0f} ms without the cache, {ttft_s[True] * 1e3:.0f} ms with it, "
        f"{ttft_s[False] / ttft_s[True]:.1f} times better"
    )


if __name__ == "__main__":
    main()
