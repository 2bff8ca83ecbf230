"""The engine agrees with Hugging Face and, however its work is cut, with itself."""

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from engine_runs import Job, logprobs_of, make_engine, random_prompt, run_jobs, tokens_of
from hf_cases import (
    GOLDENS,
    NUM_GREEDY_TOKENS,
    SHIPPED,
    prompt_of,
    shipped_prompt_ids,
    write_case,
)
from random_checkpoint import write_llama_checkpoint

from jinfer.engine.engine import Engine
from jinfer.errors import NaNLogitsError, RequestError
from jinfer.request.output import RequestOutput
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt
from jinfer.step.pack import BucketShape

# Two programs: a step of 8 tokens, and decode steps of one row. As in test_live_transformers.py,
# where the programs are the same.
ALONE: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "max_model_len": 128}
ROOMY: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 128}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("llama"), seed=3)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    engine = make_engine(checkpoint, max_num_seqs=8, max_num_batched_tokens=32)
    yield engine
    engine.close()


def free_run(num_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, logprobs=0, **params)


def random_jobs(rng: np.random.Generator, count: int) -> list[Job]:
    """Mixed prompts and parameters; some greedy, some drawn, some penalised."""
    jobs = []
    for seed in range(count):
        params: dict[str, Any] = {"temperature": float(rng.choice([0.0, 0.7, 1.5])), "seed": seed}
        if rng.random() < 0.5:
            params |= {"top_p": 0.9, "top_k": 20, "presence_penalty": 0.5}
        if rng.random() < 0.3:
            params |= {"repetition_penalty": 1.3, "min_p": 0.02, "frequency_penalty": 0.2}
        jobs.append((random_prompt(rng), free_run(int(rng.integers(1, 30)), **params)))
    return jobs


def count_calls(engine: Engine) -> Counter[str]:
    """Counts the dispatches of each program from here on."""
    calls: Counter[str] = Counter()

    def counted(name: str, run: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return run(*args)

        return call

    for name, run in engine.runner.programs.items():
        engine.runner.programs[name] = counted(name, run)
    return calls


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize("name", ["gqa4_width64_tied", "gqa4_width128_llama3"])
def test_greedy_tokens_equal_hugging_face(name: str, layer_loop: str, tmp_path: Path) -> None:
    folder = write_case(tmp_path, name)
    engine = make_engine(folder, layer_loop=layer_loop, **ALONE)
    params = free_run(NUM_GREEDY_TOKENS, temperature=0.0, prompt_logprobs=0)
    [output] = run_jobs(engine, [(prompt_of(name), params)])
    engine.close()
    goldens = np.load(GOLDENS)
    assert tokens_of(output) == [goldens[f"{name}/greedy"].tolist()]
    logits = goldens[f"{name}/logits"].astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    targets = prompt_of(name)[1:]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    got = [entry[t].logprob for entry, t in zip(output.prompt_logprobs[1:], targets, strict=True)]
    np.testing.assert_allclose(got, want[np.arange(len(targets)), targets], atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.smoke if n == "shipped_draft" else ()) for n in SHIPPED],
)
def test_shipped_model_continues_as_hugging_face(name: str) -> None:
    engine = make_engine(SHIPPED[name], **ALONE)
    params = free_run(NUM_GREEDY_TOKENS, temperature=0.0)
    [output] = run_jobs(engine, [(shipped_prompt_ids(SHIPPED[name]), params)])
    engine.close()
    assert tokens_of(output) == [np.load(GOLDENS)[f"{name}/greedy"].tolist()]


def test_alone_equals_among_forty_others(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    jobs = random_jobs(rng, 41)
    crowd = run_jobs(engine, jobs, gaps=rng.integers(0, 3, size=41))
    for place in (0, 13, 20, 33, 40):
        [alone] = run_jobs(engine, [jobs[place]])
        assert tokens_of(alone) == tokens_of(crowd[place])
        np.testing.assert_allclose(logprobs_of(alone), logprobs_of(crowd[place]), atol=1e-5)


def test_arrival_order_does_not_matter(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    jobs = random_jobs(rng, 12)
    order = rng.permutation(12)
    straight = run_jobs(engine, jobs)
    shuffled = run_jobs(engine, [jobs[place] for place in order], gaps=[0, 2] * 6)
    for place, output in zip(order, shuffled, strict=True):
        assert tokens_of(output) == tokens_of(straight[place])


def test_each_continuation_is_the_same_for_any_n(engine: Engine) -> None:
    prompt = random_prompt(np.random.default_rng(2))
    runs = {
        n: tokens_of(run_jobs(engine, [(prompt, free_run(12, temperature=1.0, seed=7, n=n))])[0])
        for n in (1, 3, 10)
    }
    assert runs[10][:3] == runs[3] and runs[3][:1] == runs[1]
    assert len(set(map(tuple, runs[10]))) == 10


def test_many_steps_a_dispatch_equal_one(checkpoint: Path) -> None:
    rng = np.random.default_rng(9)
    jobs = random_jobs(rng, 24)
    for i, stop_ids in enumerate(rng.integers(3, 128, size=(8, 6)).tolist()):
        params = {"temperature": 1.5, "seed": i, "n": 1 + i % 3, "logprobs": 2, "min_tokens": i}
        asked = SamplingParams(max_tokens=40, stop_token_ids=stop_ids, **params)
        jobs.append((random_prompt(rng), asked))
    gaps = rng.integers(0, 4, size=len(jobs)).tolist()
    runs, num_dispatches = [], []
    for max_decode_steps in (1, 5):
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_pages": 40}
        engine = make_engine(checkpoint, max_decode_steps=max_decode_steps, **settings)
        calls = count_calls(engine)
        runs.append(run_jobs(engine, jobs, gaps))
        num_dispatches.append(calls.total())
        assert engine.scheduler.num_free_pages == 39
        engine.close()
    for one, many in zip(*runs, strict=True):
        assert tokens_of(one) == tokens_of(many)
        reasons = [[(o.finish_reason, o.stop_reason) for o in out.outputs] for out in (one, many)]
        assert reasons[0] == reasons[1]
        for index in range(len(one.outputs)):
            np.testing.assert_allclose(logprobs_of(one, index), logprobs_of(many, index), atol=1e-5)
    finishes = [o.finish_reason for output in runs[0] for o in output.outputs]
    assert {"stop", "length"} <= set(finishes)
    assert num_dispatches[1] < 0.7 * num_dispatches[0]


def scored_jobs() -> list[Job]:
    rng = np.random.default_rng(4)
    prompts = [random_prompt(rng, 100, 120), random_prompt(rng, 64, 65), random_prompt(rng, 1, 2)]
    return [(p, free_run(8, temperature=0.8, seed=5, prompt_logprobs=2)) for p in prompts]


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> list[RequestOutput]:
    """What each of the jobs gives alone, its prompt in one step."""
    engine = make_engine(checkpoint, **ROOMY)
    outputs = [run_jobs(engine, [job])[0] for job in scored_jobs()]
    engine.close()
    return outputs


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunked_prefill_equals_whole(
    chunk: int, checkpoint: Path, whole: list[RequestOutput]
) -> None:
    engine = make_engine(checkpoint, long_prefill_token_threshold=chunk, **ROOMY)
    chunked = run_jobs(engine, scored_jobs())
    engine.close()
    for one, other in zip(whole, chunked, strict=True):
        assert tokens_of(one) == tokens_of(other)
        np.testing.assert_allclose(logprobs_of(one), logprobs_of(other), atol=1e-5)
        assert_same_prompt_logprobs(one.prompt_logprobs, other.prompt_logprobs)


def test_a_prompt_cut_to_fill_a_smaller_step_equals_whole(checkpoint: Path, engine: Engine) -> None:
    """Two steps of 32 tokens take less than one of 128, but enter fewer new pages each."""
    rng = np.random.default_rng(5)
    job = (rng.integers(3, 128, 64).tolist(), free_run(8, temperature=0.0))
    [want] = run_jobs(engine, [job])
    alone = make_engine(checkpoint, max_num_seqs=1, max_num_batched_tokens=128)
    assert BucketShape.of(32, alone.plan).num_page_writes < 64 // alone.plan.page_size
    calls = count_calls(alone)
    [got] = run_jobs(alone, [job])
    alone.close()
    assert calls["step of 32 tokens"] == 2
    assert tokens_of(got) == tokens_of(want)


def test_decode_logprobs_equal_prefill_logprobs(engine: Engine) -> None:
    prompt = random_prompt(np.random.default_rng(5), 20, 40)
    [decoded] = run_jobs(engine, [(prompt, free_run(40, temperature=1.0, seed=1))])
    output_ids = tokens_of(decoded)[0]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    [scored] = run_jobs(engine, [(prompt + output_ids, params)])
    assert scored.prompt_logprobs is not None
    tail = scored.prompt_logprobs[len(prompt) :]
    want = [entry[token_id].logprob for entry, token_id in zip(tail, output_ids, strict=True)]
    np.testing.assert_allclose(logprobs_of(decoded), want, atol=1e-4)


def test_preempted_equals_undisturbed(checkpoint: Path, engine: Engine) -> None:
    rng = np.random.default_rng(6)
    jobs = [
        (random_prompt(rng, 20, 40), free_run(60, temperature=0.9, seed=s, frequency_penalty=0.4))
        for s in range(6)
    ]
    undisturbed = run_jobs(engine, jobs)
    # 16 pages of 8 tokens: one longest sequence fits, six of up to 100 do not.
    tight = make_engine(checkpoint, max_model_len=128, page_size=8, num_pages=17)
    requests = []
    for number, (prompt, params) in enumerate(jobs):
        request = tight.prepare(str(number), Prompt(text=None, token_ids=tuple(prompt)), params)
        requests.append(request)
        tight.add(request)
    while tight.has_work:
        tight.step()
    num_preemptions = sum(r.completions[0].sequence.num_preemptions for r in requests)
    assert num_preemptions > 3
    assert tight.scheduler.num_free_pages == 16
    tight.close()
    for want, request in zip(undisturbed, requests, strict=True):
        assert tokens_of(request.output()) == tokens_of(want)
        np.testing.assert_allclose(logprobs_of(request.output()), logprobs_of(want), atol=1e-5)


def test_every_page_is_free_after_random_aborts(engine: Engine) -> None:
    rng = np.random.default_rng(8)
    all_free = engine.scheduler.num_free_pages
    alive: list[str] = []
    for number, (prompt, params) in enumerate(random_jobs(rng, 60)):
        request_id = f"random {number}"
        engine.add(engine.prepare(request_id, Prompt(text=None, token_ids=tuple(prompt)), params))
        alive.append(request_id)
        for _ in range(rng.integers(0, 4)):
            engine.step()
        if rng.random() < 0.4:
            engine.abort(alive.pop(rng.integers(len(alive))))
    while engine.has_work:
        engine.step()
    assert engine.scheduler.num_free_pages == all_free
    assert not engine.scheduler.num_running and not engine.scheduler.num_waiting


def assert_same_prompt_logprobs(one: Any, other: Any) -> None:
    assert len(one) == len(other) and one[0] is None and other[0] is None
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for token_id, entry in mine.items():
            assert abs(entry.logprob - theirs[token_id].logprob) < 1e-5
            assert entry.rank == theirs[token_id].rank


def test_what_only_decodes_takes_decode_programs(checkpoint: Path) -> None:
    rng = np.random.default_rng(12)
    jobs = [(random_prompt(rng, 20, 21), free_run(10, seed=seed)) for seed in range(3)]
    outputs = []
    for streams in (False, True):
        engine = make_engine(checkpoint, max_num_seqs=8, max_num_batched_tokens=32)
        calls = count_calls(engine)
        outputs.append(run_jobs(engine, jobs, streams=streams))
        engine.close()
        assert sum(calls[name] for name in calls if name.startswith("step of")) < 5  # 60 tokens
        # A watched request decodes one step at a time, which leaves it nine dispatches at least.
        assert (calls["decode of 8 rows"] >= 7) == streams
    assert list(map(tokens_of, outputs[0])) == list(map(tokens_of, outputs[1]))


@pytest.mark.parametrize("size", [1, 2])
def test_a_closed_engine_leaves_no_program(
    size: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process may map 65,530 pieces of memory. A hundred programs for CPUs fill that. Those that
    # JAX traced here are the ones that it might keep.
    monkeypatch.setattr("jinfer.startup.load.open_store", lambda devices: None)
    num_live_before = num_live_programs()
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 2, "max_decode_steps": 1}
    engine = make_engine(checkpoint, tensor_parallel_size=size, **sizes)
    assert num_live_programs() > num_live_before
    engine.close()
    del engine
    assert num_live_programs() <= num_live_before


def num_live_programs() -> int:
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


def test_logits_that_are_nan_end_that_request_only(engine: Engine) -> None:
    rng = np.random.default_rng(5)
    greedy = free_run(9, temperature=0.0, logit_bias={7: -100.0})
    sampled = greedy.replace(temperature=0.8, seed=1)
    prompts = [[token for token in random_prompt(rng, 20, 60) if token != 7] for _ in range(5)]
    jobs = [(prompt, params) for prompt in prompts for params in (greedy, sampled)]
    wanted = run_jobs(engine, jobs)
    sound = engine.runner.params
    embed_VD = np.array(sound["embed_VD"])
    embed_VD[7] = np.nan  # a token that spoils the sequences it is in
    spoilt = [([5, 7, 9], free_run(6, n=2, temperature=0.0)), ([7] * 40, sampled)]
    spoils_itself = ([8], free_run(6, logit_bias={7: 100.0}, temperature=0.0))
    engine.scheduler.forget_prefixes()
    try:
        engine.runner.params = {
            **sound, "embed_VD": jax.device_put(embed_VD, sound["embed_VD"].sharding)
        }  # fmt: skip
        got = run_jobs(engine, [*spoilt, *jobs, spoils_itself])
    finally:
        engine.runner.params = sound
    assert [tokens_of(one) for one in got[2:-1]] == [tokens_of(one) for one in wanted]
    assert all(one.error is None for one in got[2:-1])
    for output, num_tokens in ((got[0], 3), (got[1], 40), (got[-1], 2)):
        assert isinstance(output.error, NaNLogitsError) and output.finished
        with pytest.raises(RequestError, match=f"logits are NaN, after {num_tokens} tokens. Check"):
            raise output.error
        assert {one.finish_reason for one in output.outputs} == {"error"}
    assert tokens_of(got[0]) == [[], []] and tokens_of(got[-1]) == [[7]]
    assert [tokens_of(one) for one in run_jobs(engine, jobs)] == [tokens_of(one) for one in wanted]
