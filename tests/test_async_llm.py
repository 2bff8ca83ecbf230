"""Many callers at once: the same tokens as alone, and each one's end is its own."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from jinfer import LLM, AsyncEngineArgs, AsyncLLM, RequestError, RequestOutputKind, SamplingParams
from jinfer.async_llm import _Stream
from jinfer.engine.engine import Engine
from jinfer.engine.running import Completion

# The programs of tests/test_llm.py.
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 8, "max_model_len": 128, "progress": False}


def params_of(number: int, num_tokens: int = 10) -> SamplingParams:
    temperature = 0.0 if number % 2 else 1.0
    return SamplingParams(
        temperature=temperature, seed=number, max_tokens=num_tokens, ignore_eos=True
    )


def prompt_of(number: int) -> list[int]:
    return [10 + number] * (1 + number % 7)


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    """What 20 requests get from an LLM."""
    with LLM(late_compile="error", **SMALL) as llm:
        outputs = llm.generate([prompt_of(i) for i in range(20)], [params_of(i) for i in range(20)])
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def module_llm() -> Any:
    llm = AsyncLLM(late_compile="error", **SMALL)
    yield llm
    llm.close()


@pytest.fixture
async def llm(module_llm: AsyncLLM) -> AsyncIterator[AsyncLLM]:
    """An engine that must be idle and whole after every test."""
    yield module_llm
    engine = module_llm._llm.engine
    while engine.has_work or module_llm._commands:
        await asyncio.sleep(0.01)
    assert engine.scheduler.num_free_pages == engine.plan.num_pages - 1
    assert engine.num_late_compiles == 0 and not module_llm._streams and not engine._requests


async def run(llm: AsyncLLM, number: int, num_tokens: int = 10, **keywords: Any) -> Any:
    stream = llm.generate(prompt_of(number), params_of(number, num_tokens), **keywords)
    return [output async for output in stream][-1]


def ids_of(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


async def test_twenty_streams_give_what_an_llm_gives(llm: AsyncLLM, wanted: Any) -> None:
    outputs = await asyncio.gather(*(run(llm, number) for number in range(20)))
    assert [ids_of(output) for output in outputs] == wanted
    assert all(output.finished and output.metrics.e2e_s > 0.0 for output in outputs)


async def test_a_stream_only_grows_and_ends_finished(llm: AsyncLLM, wanted: Any) -> None:
    seen = [output async for output in llm.generate(prompt_of(1), params_of(1))]
    for before, after in zip(seen, seen[1:], strict=False):
        assert ids_of(after)[: len(ids_of(before))] == ids_of(before)
        assert not before.finished
    assert seen[-1].finished and ids_of(seen[-1]) == wanted[1]


async def test_deltas_add_up_for_a_slow_reader_too(llm: AsyncLLM, wanted: Any) -> None:
    params = replace(params_of(3), output_kind=RequestOutputKind.DELTA)
    seen = []
    async for output in llm.generate(prompt_of(3), params):
        seen.append(output)
        await asyncio.sleep(0.0 if len(seen) < 4 else 0.1)
    assert sum(map(ids_of, seen), []) == wanted[3] and len(seen) > 1


async def test_who_wants_the_last_output_gets_no_other(
    llm: AsyncLLM, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    most_steps = []
    max_steps = Engine._max_steps
    monkeypatch.setattr(
        Engine, "_max_steps", lambda self: most_steps.append(max_steps(self)) or most_steps[-1]
    )
    params = replace(params_of(3), output_kind=RequestOutputKind.FINAL_ONLY)
    seen = [output async for output in llm.generate(prompt_of(3), params)]
    assert list(map(ids_of, seen)) == [wanted[3]] and seen[0].finished
    assert min(most_steps) > 1  # nobody waits for single tokens


async def test_a_slow_reader_skips_outputs_but_not_the_last(llm: AsyncLLM, wanted: Any) -> None:
    seen = []
    async for output in llm.generate(prompt_of(3), params_of(3)):
        seen.append(output)
        await asyncio.sleep(0.3)
    assert len(seen) < 10 and ids_of(seen[-1]) == wanted[3]


async def test_cancelling_one_leaves_the_others(llm: AsyncLLM, wanted: Any) -> None:
    tasks = [asyncio.create_task(run(llm, number)) for number in range(6)]
    endless = asyncio.create_task(run(llm, 7, num_tokens=110))
    await asyncio.sleep(0.05)
    endless.cancel()
    outputs = await asyncio.gather(*tasks)
    assert [ids_of(output) for output in outputs] == wanted[:6]
    with pytest.raises(asyncio.CancelledError):
        await endless


async def test_leaving_a_stream_ends_its_request(llm: AsyncLLM) -> None:
    stream = llm.generate(prompt_of(1), params_of(1, 110))
    async for _ in stream:
        break
    await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(200):
        if not llm._streams:
            break
        await asyncio.sleep(0.01)
    assert not llm._llm.engine.scheduler.has_work


async def test_abort_gives_a_last_output(llm: AsyncLLM, wanted: Any) -> None:
    other = asyncio.create_task(run(llm, 2))
    stream = llm.generate(prompt_of(1), params_of(1, 110), request_id="mine")
    await anext(stream)
    llm.abort("mine")
    *_, last = [output async for output in stream]
    assert last.finished and last.outputs[0].finish_reason == "abort"
    assert 1 <= len(ids_of(last)) < 110
    assert ids_of(await other) == wanted[2]
    llm.abort("mine")  # is gone: nothing happens
    await llm.abort(["never was", "mine"])
    with pytest.raises(RequestError, match="request_id must be a string; got 5. Pass a str"):
        llm.abort([5])  # pyright: ignore[reportArgumentType]


async def test_a_bad_request_costs_no_other(llm: AsyncLLM, wanted: Any) -> None:
    good = [asyncio.create_task(run(llm, number)) for number in range(4)]
    for prompt, params, message in (
        ([], None, "a prompt needs at least one token"),
        ([5000], None, r"must be in \[0, 4096\); got 5000"),
        ([5], SamplingParams(logprobs=50), "logprobs must be at most max_logprobs=20"),
        ([5], {"temperature": 1}, "sampling_params must be SamplingParams; got dict"),
    ):
        with pytest.raises(RequestError, match=message):
            async for _ in llm.generate(prompt, params):  # pyright: ignore[reportArgumentType]
                pytest.fail("answered")
    assert [ids_of(output) for output in await asyncio.gather(*good)] == wanted[:4]


async def test_what_fails_on_the_engines_thread_costs_no_other(llm: AsyncLLM, wanted: Any) -> None:
    with pytest.raises(RequestError, match=r"request_id must be a string; got \['x'\]. Pass a str"):
        await run(llm, 1, request_id=["x"])
    with pytest.raises(
        TypeError, match="chat has no .*'chat_templat'. Did you mean chat_template?"
    ):
        async for _ in llm.chat([{"role": "user", "content": "hi"}], chat_templat="x"):
            pass
    request = llm._llm.prepare(llm._llm.render([{"role": "user", "content": "hi"}]), None)
    request.request_id = []  # pyright: ignore[reportAttributeAccessIssue]
    stream = _Stream(asyncio.get_running_loop())
    llm._submit(lambda: llm._add(request, stream))
    with pytest.raises(TypeError, match="unhashable"):
        await stream.next()
    assert ids_of(await run(llm, 1)) == wanted[1]


async def test_an_id_in_use_is_refused_and_its_owner_goes_on(llm: AsyncLLM, wanted: Any) -> None:
    owner = llm.generate(prompt_of(1), params_of(1), request_id="one")
    await anext(owner)
    with pytest.raises(RequestError, match="must be unique; got request_id='one' twice"):
        await run(llm, 2, request_id="one")
    *_, last = [output async for output in owner]
    assert last.outputs[0].finish_reason == "length" and ids_of(last) == wanted[1]
    assert ids_of(await run(llm, 2, request_id="one")) == wanted[2]  # free again


async def test_a_failure_inside_one_request_ends_that_one_only(
    llm: AsyncLLM, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = Completion._append_token

    def fail(self: Completion, token_id: int) -> None:
        if self.request.prompt_ids == prompt_of(3):
            raise UnicodeError("the detokenizer broke")
        accept(self, token_id)

    monkeypatch.setattr(Completion, "_append_token", fail)
    results = await asyncio.gather(*(run(llm, i) for i in range(5)), return_exceptions=True)
    assert isinstance(results.pop(3), UnicodeError)
    assert [ids_of(output) for output in results] == [*wanted[:3], wanted[4]]


async def test_chats_at_the_same_time(llm: AsyncLLM) -> None:
    async def tell(animal: str) -> Any:
        messages = [{"role": "user", "content": f"Tell me of a {animal}."}]
        return [output async for output in llm.chat(messages, params_of(1, 5))][-1]

    outputs = await asyncio.gather(*map(tell, ["fox", "hen", "cow", "owl"]))
    assert [("fox" in (output.prompt or "")) for output in outputs] == [True, False, False, False]
    assert all(len(ids_of(output)) == 5 for output in outputs)


async def test_arguments_of_vllm(llm: AsyncLLM, wanted: Any) -> None:
    output = await run(llm, 3, priority=2, lora_request=None, trace_headers=None)
    assert ids_of(output) == wanted[3]
    adapter: Any = "an adapter"
    with pytest.raises(NotImplementedError, match="lora_request must be None"):
        _ = [output async for output in llm.generate("x", lora_request=adapter)]
    chat = llm.chat([{"role": "user", "content": "x"}], priority=1, lora_request=adapter)
    with pytest.raises(NotImplementedError, match="lora_request must be None"):
        _ = [output async for output in chat]
    with pytest.raises(TypeError, match="generate has no parameter of this name; got 'lora'"):
        _ = [output async for output in llm.generate("x", lora=None)]
    assert llm.get_tokenizer() is llm._llm.engine.tokenizer
    assert llm.get_default_sampling_params() == llm._llm.get_default_sampling_params()


def test_a_loop_that_is_gone_does_not_stop_the_engine(module_llm: AsyncLLM, wanted: Any) -> None:
    for _ in range(3):  # every asyncio.run has a loop of its own
        output = asyncio.run(run(module_llm, 1))
        assert ids_of(output) == wanted[1]
    loop = asyncio.new_event_loop()
    stream = module_llm.generate(prompt_of(2), params_of(2, 110), request_id="orphan")
    loop.run_until_complete(anext(stream))
    loop.close()  # without telling the stream
    output = asyncio.run(run(module_llm, 3))
    assert ids_of(output) == wanted[3]
    module_llm.abort("orphan")
    del stream


async def test_a_reset_forgets_prefixes_between_two_steps() -> None:
    async with AsyncLLM(**SMALL) as llm:
        prompt = list(range(3, 3 + 40))
        hits = []
        for is_reset in (False, False, True):
            if is_reset:
                await llm.reset_prefix_cache()
            outputs = [output async for output in llm.generate(prompt, params_of(1, 4))]
            hits.append(outputs[-1].num_cached_tokens)
        assert hits == [0, 32, 0]
    with pytest.raises(RuntimeError, match="the engine must be running; got: it was closed"):
        llm.reset_prefix_cache()


def test_it_is_made_from_engine_args(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(AsyncLLM, "__init__", lambda self, **keywords: made.append(keywords))
    AsyncLLM.from_engine_args(AsyncEngineArgs("m", block_size=8))  # pyright: ignore
    assert made[0]["page_size"] == 8 and made[0]["model"] == "m"


async def test_close_with_requests_running() -> None:
    async with AsyncLLM(**SMALL) as llm:
        tasks = [asyncio.create_task(run(llm, number, num_tokens=110)) for number in range(12)]
        streaming = llm.generate(prompt_of(1), params_of(1, 110))
        await anext(streaming)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    message = "the engine must be running; got: it was closed"
    assert all(isinstance(one, RuntimeError) and message in str(one) for one in results), results
    with pytest.raises(RuntimeError, match=message):
        async for _ in streaming:
            pass
    llm.close()
    llm.abort("gone")
    with pytest.raises(RuntimeError, match=message):
        await run(llm, 1)
    assert not llm._thread.is_alive()


async def test_an_engine_that_fails_tells_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = AsyncLLM(**SMALL)
    monkeypatch.setattr("jinfer.engine.engine.pack", lambda *_, **__: 1 / 0)
    results = await asyncio.gather(*(run(llm, i) for i in range(3)), return_exceptions=True)
    message = "the engine must be running; got: .*ZeroDivisionError"
    for result in results:
        assert isinstance(result, RuntimeError)
        with pytest.raises(RuntimeError, match=message):
            raise result
    with pytest.raises(RuntimeError, match=message):
        await run(llm, 1)
    await asyncio.to_thread(llm.close)


async def test_a_reset_behind_a_step_that_fails_hides_it_from_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = AsyncLLM(**SMALL)

    def fail(*_: Any, **__: Any) -> None:
        llm.reset_prefix_cache()  # in the queue while the step runs
        raise ZeroDivisionError

    monkeypatch.setattr("jinfer.engine.engine.pack", fail)
    async with asyncio.timeout(60):
        results = await asyncio.gather(*(run(llm, i) for i in range(3)), return_exceptions=True)
    assert all("ZeroDivisionError" in str(result) for result in results), results
    await asyncio.to_thread(llm.close)
