"""Targets of time in an engine: steps become smaller, tokens stay what they are."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import make_engine, run_jobs, tokens_of
from random_checkpoint import write_llama_checkpoint

from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt
from jinfer.schedule.plan import Chunk

SIZES: dict[str, Any] = {"max_num_batched_tokens": 16, "max_decode_steps": 4}


class Sizes:
    """An observer that notes who computed how much, and in which size."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], int]] = []

    def dispatched(self, start_s: float, output: Any) -> None:
        pass

    def read(self, chunks: Sequence[Chunk], num_places: int) -> None:
        self.steps.append(([chunk.num_tokens for chunk in chunks], num_places))


def test_a_tight_target_makes_small_steps_and_the_same_tokens(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 60, n).tolist() for n in (4, 90)]
    jobs = [(prompt, SamplingParams(max_tokens=24, ignore_eos=True, seed=1)) for prompt in prompts]
    settings = {"max_num_batched_tokens": 32, "max_decode_steps": 1}
    outputs, mixed, predicted_s = [], [], []
    for targets in ({}, {"tpot_target_ms": 1e-3, "ttft_target_ms": 1e7}):
        told = "tpot_target_ms must leave time for a step; got tpot_target_ms=0.001, where the"
        with pytest.warns(UserWarning, match=told) if targets else nullcontext():
            engine = make_engine(tmp_path, **settings, **targets)
        engine.observer = sizes = Sizes()
        times = engine._pacing.pace.times
        predicted_s.append(times.predict(32))
        outputs.append(run_jobs(engine, jobs, gaps=[0, 3]))
        assert times.predict(32) not in (0.0, predicted_s[-1])  # it learns as it runs
        engine.close()
        mixed.append([n for tokens, n in sizes.steps if 1 in tokens and max(tokens) > 1])
    assert predicted_s[0] == 0.0 and 0.0 < predicted_s[1] < 5.0  # steps were timed at the start
    assert max(mixed[0]) == 32
    assert set(mixed[1]) == {4}  # the smallest in which the prompt gets on: there are four slots
    assert list(map(tokens_of, outputs[0])) == list(map(tokens_of, outputs[1]))


def test_every_program_is_timed_and_leaves_no_trace(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=1)
    rng = np.random.default_rng(0)
    jobs = [
        (rng.integers(3, 60, 20).tolist(), SamplingParams(max_tokens=12, seed=seed, top_p=0.9))
        for seed in range(3)
    ]
    outputs = []
    for targets in ({}, {"ttft_target_ms": 1e7}):
        engine = make_engine(tmp_path, **SIZES, **targets)
        timed = engine._pacing.pace.times._mean_s
        sizes = {*engine.plan.token_buckets, *engine.plan.decode_buckets} if targets else set()
        assert set(timed) == sizes and all(elapsed_s > 0 for elapsed_s in timed.values())
        outputs.append(run_jobs(engine, jobs))
        engine.close()
    assert list(map(tokens_of, outputs[0])) == list(map(tokens_of, outputs[1]))


def test_a_slow_reader_does_not_count_as_the_device(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=1)
    engine = make_engine(tmp_path, ttft_target_ms=1e7, **SIZES)
    observed_s = []
    times = engine._pacing.pace.times
    observe = times.observe
    times.observe = lambda size, elapsed_s: (observed_s.append(elapsed_s), observe(size, elapsed_s))
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
    request = engine.prepare("a", Prompt(None, (3, 4, 5)), params)
    request.streams = True
    engine.add(request)
    for turn in range(5):
        engine.step()
        if turn >= 3:
            time.sleep(3.0)
    while engine.has_work:
        engine.step()
    assert observed_s and max(observed_s) < 3.0
    time.sleep(3.0)
    observed_s.clear()
    run_jobs(engine, [([6, 7, 8], SamplingParams(max_tokens=1))])
    assert len(observed_s) == 1 and observed_s[0] < 3.0  # nothing was on its way meanwhile
    engine.close()
