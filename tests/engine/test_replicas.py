"""Replicas fed from one queue answer as one engine does, and share the work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import make_engine, random_prompt, run_jobs, tokens_of
from random_checkpoint import write_llama_checkpoint

from jinfer import LLM, SamplingParams
from jinfer.config import EngineConfig
from jinfer.engine.replicas import NUM_AHEAD, Replicas
from jinfer.errors import RequestError
from jinfer.request.prompt import Prompt
from jinfer.runner.model_runner import ModelRunner
from jinfer.schedule.scheduler import MAX_OVERTAKEN

SIZES: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 2, "max_decode_steps": 1}
NUM_JOBS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=4)


@pytest.fixture(scope="module")
def replicas(folder: Path) -> Any:
    config = EngineConfig(
        model=folder,
        skip_tokenizer_init=True,
        progress=False,
        late_compile="error",
        tensor_parallel_size=2,
        data_parallel_size=2,
        **SIZES,
    )
    made = Replicas(config)
    yield made
    made.close()


def test_tokens_are_those_of_one_engine_and_every_replica_works(
    folder: Path, replicas: Replicas
) -> None:
    rng = np.random.default_rng(2)
    jobs = []
    for number in range(NUM_JOBS):  # half without a seed: it must not depend on the replica either
        seed = number if number % 2 else None
        jobs.append(
            (random_prompt(rng, 1, 30), SamplingParams(max_tokens=6, seed=seed, n=1 + number % 2))
        )
    alone = make_engine(folder, **SIZES)
    want = run_jobs(alone, jobs)
    alone.close()
    before = replicas.metrics()
    num_steps_with = [0] * len(replicas.engines)
    requests = []
    for number, (prompt_ids, params) in enumerate(jobs):
        prompt = Prompt(text=None, token_ids=tuple(prompt_ids))
        requests.append(replicas.prepare(f"job {number}", prompt, params))
        replicas.add(requests[-1])
    assert replicas.metrics().num_waiting == sum(len(output.outputs) for output in want)
    while replicas.has_work:
        replicas.step()
        for number, engine in enumerate(replicas.engines):
            num_steps_with[number] += engine.load.num_running > 0
            assert engine.load.num_waiting <= NUM_AHEAD + SIZES["max_num_seqs"]
    assert [tokens_of(r.output()) for r in requests] == [tokens_of(output) for output in want]
    assert min(num_steps_with) > 0.8 * max(num_steps_with)
    after = replicas.metrics()
    num_prompt_tokens = after.num_prompt_tokens - before.num_prompt_tokens
    assert num_prompt_tokens == sum(len(prompt_ids) for prompt_ids, _ in jobs)
    assert after.num_waiting == after.num_running == 0
    assert replicas.num_late_compiles == 0
    used = [set(map(str, engine.runner.pages.sharding.device_set)) for engine in replicas.engines]
    assert len(set.union(*used)) == 4  # two devices each, none shared


def test_what_waits_can_be_aborted_and_priorities_count(replicas: Replicas) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    prompt = Prompt(text=None, token_ids=(5, 6, 7))
    requests = {}
    for number in range(NUM_JOBS):
        name = f"request {number}"
        urgent = number == NUM_JOBS - 1
        requests[name] = replicas.prepare(name, prompt, params, priority=-1 if urgent else 0)
        replicas.add(requests[name])
    with pytest.raises(RequestError, match="must be unique; got request_id='request 3' twice"):
        replicas.add(requests["request 3"])
    assert replicas.abort("nobody's") is None
    aborted = replicas.abort("request 20")
    assert (
        aborted is requests["request 20"] and aborted.output().outputs[0].finish_reason == "abort"
    )
    finished = []
    while replicas.has_work:
        finished += [request.request_id for request in replicas.step() if request.finished]
    assert len(finished) == NUM_JOBS - 1 and "request 20" not in finished
    assert finished.index(f"request {NUM_JOBS - 1}") < 6  # among the first in a slot
    replicas.reset_prefix_cache()


def test_a_stream_of_urgent_requests_starves_nobody(replicas: Replicas) -> None:
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    prompt = Prompt(text=None, token_ids=(5, 6, 7))
    num_urgent, last = 0, replicas.prepare("patient", prompt, params, priority=1)
    replicas.add(last)
    while not last.finished:
        for _ in range(8):  # always more than leave
            urgent = replicas.prepare(f"urgent {num_urgent}", prompt, params, priority=0)
            replicas.add(urgent)
            num_urgent += 1
        replicas.step()
        assert num_urgent < 2000
    while replicas.has_work:
        replicas.step()
    assert num_urgent > MAX_OVERTAKEN


def test_a_broken_replica_hides_no_error_and_keeps_no_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"skip_tokenizer_init": True, "progress": False, "data_parallel_size": 2}
    llm = LLM(folder, **asked, **SIZES)
    engine = llm.engine
    assert isinstance(engine, Replicas)
    runners = [replica.runner for replica in engine.engines]
    pages = [runner.pages for runner in runners if isinstance(runner, ModelRunner)]

    def fail(*_: Any) -> None:
        raise RuntimeError("the chip is gone")

    monkeypatch.setattr(runners[0], "run", fail)
    prompts = [{"prompt_token_ids": [4 + i, 9]} for i in range(40)]
    with pytest.raises(RuntimeError, match="the chip is gone"):
        llm.generate(prompts, SamplingParams(max_tokens=5))
    assert not engine.has_work or engine.metrics().num_waiting == 0  # nothing is left in the queue
    llm.close()
    assert len(pages) == 2 and all(one.is_deleted() for one in pages)


def test_the_public_api_takes_replicas(folder: Path) -> None:
    params = SamplingParams(max_tokens=5, temperature=1.0, seed=3)
    prompts = [{"prompt_token_ids": [4 + i, 9]} for i in range(5)]
    tokens = []
    for size in (1, 3):
        asked = {"skip_tokenizer_init": True, "progress": False, "data_parallel_size": size}
        with LLM(folder, **asked, **SIZES) as llm:
            tokens.append([tokens_of(o) for o in llm.generate(prompts, params)])
        with pytest.raises(RuntimeError, match="closed"):
            llm.generate(prompts, params)
    assert tokens[0] == tokens[1]
