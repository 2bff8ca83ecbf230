"""What the prefix cache gives is what computing would have given."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import Job, logprobs_of, make_engine, random_prompt, run_jobs, tokens_of
from random_checkpoint import write_llama_checkpoint

from jinfer.engine.engine import Engine
from jinfer.engine.running import Request
from jinfer.request.output import RequestOutput
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt
from jinfer.schedule.plan import PageRestore
from jinfer.startup.load import break_even_pages
from jinfer.step.page_moves import PAGES_PER_MOVE

SETTINGS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 8, "max_model_len": 128}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("llama"), seed=3)


@pytest.fixture(scope="module")
def uncached(checkpoint: Path) -> Iterator[Engine]:
    engine = make_engine(checkpoint, enable_prefix_caching=False, **SETTINGS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    engine = make_engine(checkpoint, **SETTINGS)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def forget(engine: Engine) -> None:
    engine.reset_prefix_cache()


def asked(num_tokens: int = 8, temperature: float = 0.0, **params: Any) -> SamplingParams:
    usual = {"ignore_eos": True, "logprobs": 0, "temperature": temperature}
    return SamplingParams(max_tokens=num_tokens, **usual, **params)


def jobs_that_share(rng: np.random.Generator, count: int, longest: int = 20) -> list[Job]:
    """Prompts of a few families that begin alike, for lengths at and off the edges of pages."""
    families = [random_prompt(rng, 60, 61) for _ in range(3)]
    jobs: list[Job] = []
    for seed in range(count):
        family = families[rng.integers(3)]
        prompt = family[: rng.choice([7, 8, 9, 16, 31, 32, 33, 60])] + random_prompt(rng, 1, 12)
        params = {"temperature": float(rng.choice([0.0, 0.9])), "seed": seed, "n": 1 + seed % 2}
        jobs.append((prompt, asked(int(rng.integers(1, longest)), frequency_penalty=0.3, **params)))
    return jobs


def assert_same(one: RequestOutput, other: RequestOutput) -> None:
    assert tokens_of(one) == tokens_of(other)
    for index in range(len(one.outputs)):
        np.testing.assert_allclose(logprobs_of(one, index), logprobs_of(other, index), atol=1e-5)


def test_cached_equals_uncached(engine: Engine, uncached: Engine) -> None:
    rng = np.random.default_rng(0)
    jobs = jobs_that_share(rng, 40)
    gaps = rng.integers(0, 4, size=40).tolist()
    cached = run_jobs(engine, jobs, gaps)
    for one, other in zip(cached, run_jobs(uncached, jobs, gaps), strict=True):
        assert_same(one, other)
        assert other.num_cached_tokens == 0
    hits = [output.num_cached_tokens for output in cached]
    assert sum(hits) > 500 and all(hit % 8 == 0 for hit in hits)
    assert all(h < len(prompt) for h, (prompt, _) in zip(hits, jobs, strict=True))
    assert engine.scheduler.num_free_pages == engine.plan.num_pages - 1


def test_cached_equals_uncached_under_preemption(checkpoint: Path, uncached: Engine) -> None:
    jobs = jobs_that_share(np.random.default_rng(1), 24, longest=56)
    tight = make_engine(checkpoint, num_pages=17, **SETTINGS)  # one longest sequence
    requests = []
    for number, (prompt, params) in enumerate(jobs):
        prompt_of = Prompt(text=None, token_ids=tuple(prompt))
        requests.append(tight.prepare(str(number), prompt_of, params))
        tight.add(requests[-1])
    while tight.has_work:
        tight.step()
    sequences = [c.sequence for r in requests for c in r.completions]
    assert sum(s.num_preemptions for s in sequences) > 3
    assert sum(s.num_cached for s in sequences) > 100
    assert tight.scheduler.num_free_pages == 16
    tight.close()
    for request, want in zip(requests, run_jobs(uncached, jobs), strict=True):
        assert_same(request.output(), want)


def test_the_next_turn_finds_the_answer_too(engine: Engine, uncached: Engine) -> None:
    prompt = random_prompt(np.random.default_rng(2), 30, 31)
    [first] = run_jobs(engine, [(prompt, asked(20))])
    turn = [*prompt, *tokens_of(first)[0], 5, 6, 7]
    [second] = run_jobs(engine, [(turn, asked())])
    # Every token but the answer's last was computed: 49 of them, six full pages.
    assert second.num_cached_tokens == 48 == second.metrics.num_cached_tokens
    assert_same(second, run_jobs(uncached, [(turn, asked())])[0])


def test_continuations_of_one_prompt_compute_it_once(engine: Engine, uncached: Engine) -> None:
    job = (random_prompt(np.random.default_rng(3), 41, 42), asked(n=4, temperature=1.0, seed=1))
    request = engine.prepare("n", Prompt(text=None, token_ids=tuple(job[0])), job[1])
    engine.add(request)
    while engine.has_work:
        engine.step()
    assert [c.sequence.num_cached for c in request.completions] == [0, 40, 40, 40]
    assert_same(request.output(), run_jobs(uncached, [job])[0])


def test_requests_that_arrive_together_compute_their_prefix_once(engine: Engine) -> None:
    rng = np.random.default_rng(4)
    shared = random_prompt(rng, 96, 97)  # three steps long
    outputs = run_jobs(engine, [([*shared, 3 + i], asked()) for i in range(4)])
    assert [output.num_cached_tokens for output in outputs] == [0, 96, 96, 96]


def test_scored_prompts_are_computed_whole(engine: Engine, uncached: Engine) -> None:
    job = (random_prompt(np.random.default_rng(5), 40, 41), asked(prompt_logprobs=1))
    run_jobs(engine, [(job[0], asked())])
    [scored] = run_jobs(engine, [job])
    assert scored.num_cached_tokens == 0 and len(scored.prompt_logprobs or []) == 40
    assert_same(scored, run_jobs(uncached, [job])[0])


def test_salts_share_with_their_own_only(engine: Engine) -> None:
    ids = tuple(random_prompt(np.random.default_rng(6), 40, 41))
    hits = []
    for number, salt in enumerate(["", "a", "b", "a", ""]):
        prompt = Prompt(text=None, token_ids=ids, cache_salt=salt)
        request = engine.prepare(f"salt {number}", prompt, asked())
        engine.add(request)
        while engine.has_work:
            engine.step()
        hits.append(request.output().num_cached_tokens)
    assert hits == [0, 0, 0, 32, 32]


def test_a_reset_forgets(engine: Engine) -> None:
    job = (random_prompt(np.random.default_rng(7), 40, 41), asked())
    assert [run_jobs(engine, [job])[0].num_cached_tokens for _ in range(2)] == [0, 32]
    engine.reset_prefix_cache()
    assert run_jobs(engine, [job])[0].num_cached_tokens == 0


def test_every_page_is_free_after_random_aborts(engine: Engine) -> None:
    rng = np.random.default_rng(8)
    alive: list[str] = []
    for number, (prompt, params) in enumerate(jobs_that_share(rng, 60)):
        request_id = f"random {number}"
        engine.add(engine.prepare(request_id, Prompt(text=None, token_ids=tuple(prompt)), params))
        alive.append(request_id)
        for _ in range(rng.integers(0, 4)):
            engine.step()
        if rng.random() < 0.4:
            engine.abort(alive.pop(rng.integers(len(alive))))
    while engine.has_work:
        engine.step()
    assert engine.scheduler.num_free_pages == engine.plan.num_pages - 1


def run_requests(engine: Engine, jobs: list[Job]) -> list[Request]:
    """Runs jobs that all arrive at once; their requests."""
    requests = []
    for number, (prompt, params) in enumerate(jobs):
        prompt_of = Prompt(text=None, token_ids=tuple(prompt))
        requests.append(engine.prepare(f"job {number}", prompt_of, params))
        engine.add(requests[-1])
    while engine.has_work:
        engine.step()
    assert engine.num_late_compiles == 0
    return requests


@pytest.mark.parametrize("num_tokens", [5, 40, 41, 45, 96])
def test_a_prompt_of_n_continuations_is_computed_once(
    engine: Engine, uncached: Engine, num_tokens: int
) -> None:
    rng = np.random.default_rng(num_tokens)
    job = (random_prompt(rng, num_tokens, num_tokens + 1), asked(n=4, temperature=1.0, seed=1))
    [request] = run_requests(engine, [job])
    cached = [c.sequence.num_cached for c in request.completions]
    # All but the last token, whose logits every one of them needs.
    assert cached == [0, *[num_tokens - 1] * 3]
    assert_same(request.output(), run_jobs(uncached, [job])[0])


def note_restores(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[PageRestore]:
    """A list that grows by every page that comes back from host memory."""
    restored: list[PageRestore] = []
    move_pages = engine.runner.move_pages

    def move_and_note(saves: Any, restores: Any, *others: Any) -> None:
        restored.extend(restores)
        move_pages(saves, restores, *others)

    monkeypatch.setattr(engine.runner, "move_pages", move_and_note)
    return restored


def test_the_host_keeps_what_the_pool_gives_up(
    checkpoint: Path, uncached: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jinfer.startup.load.break_even_pages", lambda plan, runner: 1)
    jobs = jobs_that_share(np.random.default_rng(9), 30, longest=40)
    want = run_jobs(uncached, jobs)
    tight = make_engine(checkpoint, num_pages=17, kv_offloading_size=1 / 1024, **SETTINGS)
    assert tight.plan.num_host_pages == 2**20 // tight.plan.page_bytes
    restored = note_restores(tight, monkeypatch)
    for _ in range(2):
        requests = run_requests(tight, jobs)
        for request, output in zip(requests, want, strict=True):
            assert_same(request.output(), output)
        assert sum(c.sequence.num_preemptions for r in requests for c in r.completions) > 3
    assert len(restored) > 50
    assert 0 < tight.runner.mover.num_stored <= tight.plan.num_host_pages
    tight.reset_prefix_cache()
    run_jobs(tight, jobs[:1])
    assert tight.runner.mover.num_stored <= 3
    tight.close()


def test_what_it_takes_to_fetch_a_page_is_measured(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, kv_offloading_size=1 / 1024, **SETTINGS)
    num_pages = break_even_pages(engine.plan, engine.runner)
    assert num_pages is None or 1 <= num_pages <= PAGES_PER_MOVE
    assert engine.runner.mover.num_stored == 0
    run_jobs(engine, [(random_prompt(np.random.default_rng(0)), asked())])
    engine.close()


@pytest.mark.parametrize("kv_offloading_size", [None, 1 / 1024], ids=["alone", "with_host_tier"])
def test_a_pool_full_of_nan_changes_nothing(
    checkpoint: Path,
    uncached: Engine,
    monkeypatch: pytest.MonkeyPatch,
    kv_offloading_size: float | None,
) -> None:
    monkeypatch.setattr("jinfer.startup.load.break_even_pages", lambda plan, runner: 1)
    jobs = jobs_that_share(np.random.default_rng(10), 24, longest=40)
    host = {"kv_offloading_size": kv_offloading_size}
    poisoned = make_engine(checkpoint, num_pages=17, **host, **SETTINGS)
    pages = poisoned.runner.pages
    poisoned.runner.pages = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), pages)
    wanted = run_jobs(uncached, jobs)
    for request, want in zip(run_requests(poisoned, jobs), wanted, strict=True):
        assert_same(request.output(), want)
    if kv_offloading_size:
        restored = note_restores(poisoned, monkeypatch)
        for request, want in zip(run_requests(poisoned, jobs), wanted, strict=True):
            assert_same(request.output(), want)
        assert restored
    poisoned.close()
