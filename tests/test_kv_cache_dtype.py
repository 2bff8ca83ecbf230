"""KV pages of 8 bits in a whole engine: near the float ones, and exact in all else."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from engine_runs import Job, logprobs_of, make_engine, random_prompt, run_jobs, tokens_of
from hf_cases import SHIPPED, shipped_prompt_ids
from random_checkpoint import write_llama_checkpoint

from jinfer.engine.engine import Engine
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt
from kernels_pallas.paged_attention.pages import cells_of

KV_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


@pytest.fixture(scope="module", params=["int8", "fp8"])
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_llama_checkpoint(tmp_path_factory.mktemp("llama"), seed=3)
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 8, "page_size": 8}
    engine = make_engine(folder, kv_cache_dtype=request.param, **sizes)
    yield engine
    engine.close()


@cache
def scored(kv_cache_dtype: str) -> np.ndarray:
    """Logprobs of a text of 120 tokens under a shipped model, [119]."""
    folder = SHIPPED["shipped_draft"]
    text = (list(shipped_prompt_ids(folder)) * 8)[:120]
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "max_model_len": 128}
    engine = make_engine(folder, kv_cache_dtype=kv_cache_dtype, **sizes)
    [output] = run_jobs(engine, [(text, SamplingParams(max_tokens=1, prompt_logprobs=0))])
    engine.close()
    assert output.prompt_logprobs is not None
    pairs = zip(output.prompt_logprobs[1:], text[1:], strict=True)
    return np.array([entry[token_id].logprob for entry, token_id in pairs if entry is not None])


# Three times what was seen: a number is kept to half a 127th of its head's largest in int8, to
# a 16th of itself in fp8.
@pytest.mark.parametrize(
    ("kv_cache_dtype", "mean", "largest"), [("int8", 0.009, 0.05), ("fp8", 0.035, 0.2)]
)
def test_logprobs_stay_near(kv_cache_dtype: str, mean: float, largest: float) -> None:
    error = np.abs(scored(kv_cache_dtype) - scored("auto"))
    assert 0 < error.mean() < mean
    assert error.max() < largest


def jobs_that_share(rng: np.random.Generator, count: int) -> list[Job]:
    """Prompts that begin alike, for lengths at and off the edges of pages."""
    shared = random_prompt(rng, 60, 61)
    jobs: list[Job] = []
    for seed in range(count):
        prompt = shared[: rng.choice([7, 8, 9, 16, 31, 33, 60])] + random_prompt(rng, 1, 12)
        params: dict[str, Any] = {"temperature": float(rng.choice([0.0, 0.9])), "logprobs": 0}
        jobs.append((prompt, SamplingParams(max_tokens=12, ignore_eos=True, seed=seed, **params)))
    return jobs


# Sums in another order differ by 1e-6, and now and then a number between two of 8 bits is then kept
# as the other one: 3.6e-4 was seen in int8.
FLIPPED = {"int8": 0.002, "fp8": 0.008}


def test_batched_and_cached_equal_alone_and_uncached(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    jobs = jobs_that_share(rng, 16)
    crowd = run_jobs(engine, jobs, gaps=rng.integers(0, 4, size=16).tolist())
    assert sum(output.num_cached_tokens for output in crowd) > 100
    errors: list[float] = []
    for job, among_others in zip(jobs, crowd, strict=True):
        engine.reset_prefix_cache()
        [alone] = run_jobs(engine, [job])
        assert alone.num_cached_tokens == 0
        assert tokens_of(alone) == tokens_of(among_others)
        errors += np.abs(np.subtract(logprobs_of(alone), logprobs_of(among_others))).tolist()
    assert np.median(errors) < 1e-5
    assert max(errors) < FLIPPED[engine.config.kv_cache_dtype]
    assert engine.scheduler.num_free_pages == engine.plan.num_pages - 1


def test_the_pool_is_what_the_plan_counted(engine: Engine) -> None:
    plan, pages = engine.plan, engine.runner.pages
    assert plan.kv_dtype == KV_DTYPES[engine.config.kv_cache_dtype] == cells_of(pages).dtype
    assert sum(part.nbytes for part in pages) == plan.num_pages * plan.page_bytes


def test_pages_of_one_dtype_are_not_found_in_another(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Prompt(text=None, token_ids=(5, 6))

    def root_key() -> bytes:
        request = engine.prepare("any", prompt, SamplingParams())
        return request.completions[0].sequence.root_key

    own = root_key()
    assert root_key() == own
    monkeypatch.setattr(engine, "plan", replace(engine.plan, kv_dtype="float32"))
    assert root_key() != own
