"""Driving an engine step by step, for the agreement tests."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jinfer.config import EngineConfig
from jinfer.engine.engine import Engine
from jinfer.request.output import RequestOutput
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt

Job = tuple[Sequence[int], SamplingParams]


def make_engine(folder: Path, **settings: Any) -> Engine:
    """An engine without tokenizer, that fails the test if it compiles after warm-up."""
    usual = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "late_compile": "error"}
    return Engine(
        EngineConfig(
            model=folder,
            skip_tokenizer_init=True,
            progress=False,
            **{**usual, **settings},
        )
    )


def run_jobs(
    engine: Engine,
    jobs: Iterable[Job],
    gaps: Iterable[int] = (),
    *,
    may_compile: bool = False,
    streams: bool = False,
) -> list[RequestOutput]:
    """Runs every job to its end; job i is added `gaps[i]` steps after job i - 1 (0 by default)."""
    requests, waits = [], iter(gaps)
    for number, (prompt_ids, params) in enumerate(jobs):
        for _ in range(next(waits, 0)):
            engine.step()
        prompt = Prompt(text=None, token_ids=tuple(prompt_ids))
        requests.append(engine.prepare(f"job {number}", prompt, params))
        requests[-1].streams = streams
        engine.add(requests[-1])
    while engine.has_work:
        engine.step()
    assert may_compile or engine.num_late_compiles == 0
    return [request.output() for request in requests]


def tokens_of(output: RequestOutput) -> list[list[int]]:
    """Token ids of each of the request's outputs."""
    return [list(one.token_ids) for one in output.outputs]


def logprobs_of(output: RequestOutput, index: int = 0) -> np.ndarray:
    """Logprob of each token that was drawn for one of the outputs, [num_tokens]."""
    one = output.outputs[index]
    assert one.logprobs is not None
    pairs = zip(one.token_ids, one.logprobs, strict=True)
    return np.array([entry[token_id].logprob for token_id, entry in pairs])


def random_prompt(rng: np.random.Generator, low: int = 1, high: int = 60) -> list[int]:
    """Token ids in [3, 128): the vocabulary of the random checkpoints past their end token."""
    return rng.integers(3, 128, size=rng.integers(low, high)).tolist()
