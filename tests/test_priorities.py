"""Lower priorities begin first, through every door, and wrong ones are refused."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from jinfer import LLM, SamplingParams
from jinfer.async_llm import AsyncLLM
from jinfer.errors import RequestError

ONE_AT_A_TIME: dict[str, Any] = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 8,
    "max_decode_steps": 1,
    "max_model_len": 64,
    "progress": False,
}
BRIEF = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**ONE_AT_A_TIME) as llm:
        yield llm


def test_the_lowest_goes_first(llm: LLM) -> None:
    prompts = ["One", "Two", "Three", "Four"]
    outputs = llm.generate(prompts, BRIEF, priority=[1, 0, -3, 0], use_tqdm=False)
    finished = [output.metrics.finished_time or 0.0 for output in outputs]
    assert sorted(range(4), key=finished.__getitem__) == [2, 1, 3, 0]
    assert outputs == sorted(outputs, key=lambda o: int(o.request_id))
    alike = llm.generate(prompts, BRIEF, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in alike] == [o.outputs[0].token_ids for o in outputs]


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        ([1], "priority needs one entry per prompt; got 1 for 2 prompts"),
        ([1, 0.5], r"priority must be a list of integers; got priority=\[1, 0.5\]"),
        (1.5, "priority must be a list of integers; got priority=1.5. Pass one integer"),
        ([True, 1], "priority must be a list of integers"),
    ],
)
def test_wrong_priorities_are_refused(llm: LLM, priority: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["One", "Two"], BRIEF, priority=priority, use_tqdm=False)


async def test_coroutines_have_priorities_too() -> None:
    async with AsyncLLM(**ONE_AT_A_TIME) as llm:
        order: list[int] = []
        long = SamplingParams(max_tokens=40, ignore_eos=True)

        async def ask(priority: int, params: SamplingParams) -> None:
            async for _ in llm.generate("One", params, priority=priority):
                pass
            order.append(priority)

        first = asyncio.create_task(ask(-1, long))  # the others arrive while it runs
        while not llm._streams:
            await asyncio.sleep(0.001)
        await asyncio.gather(first, ask(5, BRIEF), ask(1, BRIEF))
        assert order == [-1, 1, 5]


@pytest.mark.parametrize("priority", [None, "1", 0.5, True, float("nan")])
async def test_a_wrong_priority_costs_its_own_coroutine_only(priority: Any) -> None:
    async with AsyncLLM(**ONE_AT_A_TIME) as llm:
        other = llm.generate("One", SamplingParams(max_tokens=8, ignore_eos=True))
        output = await anext(other)  # the last one already, if the engine was much faster
        with pytest.raises(RequestError, match="a priority must be an integer; got"):
            async for _ in llm.generate("Two", BRIEF, priority=priority):
                pass
        rest = [later async for later in other]
        assert [output, *rest][-1].finished
