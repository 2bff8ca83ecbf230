"""Runs a recorded load on a far too small pool: do all requests finish, and at what cost.

    python -m jinfer.bench.pressure AzureLLMInferenceTrace_conv.csv

The trace is the conversation part of Azure's public LLM inference traces of 2023 (columns
TIMESTAMP, ContextTokens, GeneratedTokens). Here its clock runs faster and its lengths are divided,
so that a small model gets the same shape of load. First an engine with an ample pool measures the
most pages that the load ever holds; the other engine's pool is a quarter of that. Then both
alternate, so that a machine whose speed drifts slows both. Prompts are random: the prefix cache
only helps a preempted request, which may find its own pages.
"""

import argparse
import csv
import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from jinfer.config import EngineConfig
from jinfer.engine.engine import Engine
from jinfer.engine.running import Request
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt
from jinfer.shipped import DEFAULT_MODEL


@dataclass(frozen=True)
class Arrival:
    """One request of the load."""

    time_s: float  # since the load began
    prompt_ids: tuple[int, ...]
    num_output_tokens: int


@dataclass(frozen=True)
class Result:
    """The figures of one run of the load."""

    elapsed_s: float
    cpu_s: float  # of all threads, so other programs on the machine do not count
    num_computed: int  # tokens, including those computed again
    num_dispatches: int
    num_preemptions: int
    most_pages: int  # allocated at one time
    longest_wait_s: float  # from arrival to first token

    @property
    def tokens_per_s(self) -> float:
        return self.num_computed / self.elapsed_s

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.num_computed / self.cpu_s


def read_load(path: Path, args: argparse.Namespace, vocab_size: int) -> list[Arrival]:
    """The first requests of a trace, with scaled clock and lengths."""
    rng = np.random.default_rng(0)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(args.requests), strict=False)]
    # The trace has seven digits of a second's fraction; datetime reads six.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    load = []
    for row, moment in zip(rows, times, strict=True):
        num_prompt = max(1, int(row["ContextTokens"]) // args.divide)
        num_output = max(1, int(row["GeneratedTokens"]) // args.divide)
        load.append(
            Arrival(
                time_s=(moment - times[0]).total_seconds() / args.compress,
                prompt_ids=tuple(rng.integers(3, vocab_size, size=num_prompt).tolist()),
                num_output_tokens=num_output,
            )
        )
    return load


def play(engine: Engine, load: list[Arrival]) -> Result:
    """Runs the load to its end; raises unless every request completes."""
    engine.reset_prefix_cache()
    num_usable = engine.plan.num_pages - 1
    requests: list[Request] = []
    num_computed = num_dispatches = most_pages = 0
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    while len(requests) < len(load) or engine.has_work:
        now_s = time.perf_counter() - start_s
        while len(requests) < len(load) and load[len(requests)].time_s <= now_s:
            requests.append(_add(engine, load[len(requests)], str(len(requests))))
        if not engine.has_work:
            time.sleep(max(0.0, load[len(requests)].time_s - now_s))
            continue
        engine.step()
        if engine._pending is not None:
            num_dispatches += 1
            num_computed += sum(c.num_tokens + c.num_steps - 1 for c in engine._pending.plan.chunks)
        most_pages = max(most_pages, num_usable - engine.scheduler.num_free_pages)
    elapsed_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    for request, arrival in zip(requests, load, strict=True):
        [sequence] = [c.sequence for c in request.completions]
        assert len(sequence.output_ids) == arrival.num_output_tokens, f"{request.request_id=}"
    return Result(
        elapsed_s=elapsed_s,
        cpu_s=cpu_s,
        num_computed=num_computed,
        num_dispatches=num_dispatches,
        num_preemptions=sum(r.completions[0].sequence.num_preemptions for r in requests),
        most_pages=most_pages,
        longest_wait_s=max(request.metrics.ttft_s or 0.0 for request in requests),
    )


def _add(engine: Engine, arrival: Arrival, name: str) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=arrival.num_output_tokens, ignore_eos=True)
    request = engine.prepare(name, Prompt(text=None, token_ids=arrival.prompt_ids), params)
    engine.add(request)
    return request


def make_engine(
    load: list[Arrival], num_step_tokens: int | None, num_pages: int | None = None
) -> Engine:
    """An engine of the shipped model whose context just fits the load."""
    longest = max(len(a.prompt_ids) + a.num_output_tokens for a in load)
    return Engine(
        EngineConfig(
            model=DEFAULT_MODEL,
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_batched_tokens=num_step_tokens,
            num_pages=num_pages,
            late_compile="error",
            progress=False,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A recorded load on a quarter of its pages.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--compress", type=float, default=20.0, help="factor on the clock's speed")
    parser.add_argument("--divide", type=int, default=8, help="divisor of the lengths")
    parser.add_argument("--step-tokens", type=int, help="per step; default: the engine's")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    vocab_size = 4096  # of the shipped model
    load = read_load(args.trace, args, vocab_size)
    ample = make_engine(load, args.step_tokens)
    demand = play(ample, load).most_pages
    smallest = ample.plan.pages_per_slot
    tight = make_engine(load, args.step_tokens, num_pages=1 + max(demand // 4, smallest))
    runs = [(play(ample, load), play(tight, load)) for _ in range(args.repeats)]
    num_tokens = sum(len(a.prompt_ids) + a.num_output_tokens for a in load)
    print(f"{len(load)} requests, {num_tokens:,} tokens in {load[-1].time_s:.1f} s; all completed")
    for name, engine, place in (("ample", ample, 0), ("a quarter", tight, 1)):
        results = [run[place] for run in runs]
        print(
            f"{name}: {engine.plan.num_pages - 1} pages, at most "
            f"{max(r.most_pages for r in results)} held; "
            f"{statistics.median(r.num_preemptions for r in results):.0f} preemptions, "
            f"{statistics.median(r.num_computed for r in results):,.0f} tokens computed "
            f"in {statistics.median(r.num_dispatches for r in results):.0f} dispatches, "
            f"{statistics.median(r.tokens_per_s for r in results):,.0f} per second, "
            f"{statistics.median(r.tokens_per_cpu_s for r in results):,.0f} per CPU second, "
            f"longest wait {statistics.median(r.longest_wait_s for r in results):.1f} s"
        )
    ratio = statistics.median(few.tokens_per_s / many.tokens_per_s for many, few in runs)
    cpu_ratio = statistics.median(
        few.tokens_per_cpu_s / many.tokens_per_cpu_s for many, few in runs
    )
    print(
        f"throughput per token computed, a quarter of the pages over ample: {ratio:.3f}; "
        f"per CPU second: {cpu_ratio:.3f}"
    )


if __name__ == "__main__":
    main()
