"""The plan of `jinfer generate`; its answers are in tests/test_cli.py."""

import pytest

from jinfer import SamplingParams
from jinfer.cli.arguments import parse, sampling_args
from jinfer.cli.generate import cut_line, made_to_measure, params_of_each, summary
from jinfer.cli.prompts import Entry
from jinfer.errors import RequestError
from jinfer.request.output import CompletionOutput, RequestMetrics, RequestOutput
from jinfer.request.prompt import Prompt


def test_an_engine_is_made_to_measure() -> None:
    def sizes(prompts: list[Prompt], *words: str, **sampling: int) -> tuple[int, ...]:
        args = parse(["generate", *words])
        entries = [Entry(place="", prompt=prompt, sampling=sampling) for prompt in prompts]
        params = params_of_each(entries, SamplingParams(), sampling_args(args))
        return tuple(made_to_measure(entries, params, args).values())

    short, ids = Prompt("Once upon a time", None), Prompt(None, tuple(range(100)))
    assert sizes([short]) == (1, 8)
    assert sizes([short, ids]) == (2, 128)
    assert sizes([short], n=3) == sizes([short], "--n", "3") == (3, 8)
    assert sizes([Prompt("a" * 10**6, None)]) == (1, 512)
    assert sizes([short], "--prompt-logprobs", "0") == sizes([short], prompt_logprobs=0) == (32, 32)
    assert sizes([short] * 9) == ()
    assert sizes([short], "--max-num-seqs", "2") == ()
    assert sizes([short], "--max-num-batched-tokens", "64") == (1,)
    assert sizes([short] * 4, "--max-num-batched-tokens", "2") == (2,)


def test_the_model_then_the_flags_then_the_line_set_the_parameters() -> None:
    entries = [Entry(place="a", sampling={"top_k": 3, "max_tokens": None}), Entry(place="b")]
    defaults = SamplingParams(temperature=0.5, top_k=1)
    first, second = params_of_each(entries, defaults, {"top_k": 2, "seed": 7})
    assert (first.temperature, first.top_k, first.seed, first.max_tokens) == (0.5, 3, 7, None)
    assert (second.top_k, second.max_tokens) == (2, 256)
    [long] = params_of_each(entries[1:], defaults, {"min_tokens": 300})
    assert long.max_tokens == 300
    [models] = params_of_each(entries[1:], SamplingParams(max_tokens=1000), {})
    assert models.max_tokens == 1000
    with pytest.raises(RequestError, match="a: min_tokens must not exceed max_tokens"):
        params_of_each([Entry(place="a", sampling={"max_tokens": 2})], defaults, {"min_tokens": 3})


def test_a_full_context_is_no_limit_of_the_user() -> None:
    def output(*lengths: int, reason: str = "length") -> RequestOutput:
        outputs = [
            CompletionOutput(index=i, text="", token_ids=[0] * length, finish_reason=reason)
            for i, length in enumerate(lengths)
        ]
        return RequestOutput(
            request_id="",
            prompt="",
            prompt_token_ids=[0] * 4,
            outputs=outputs,
            finished=True,
            metrics=RequestMetrics(),
        )

    params = SamplingParams(max_tokens=8)
    assert cut_line([output(8, reason="stop")], [params], 12) is None
    full = "the output was cut: the context of 12 tokens is full"
    assert cut_line([output(8)], [params], 12) == full
    several = "2 of 3 outputs were cut at the limit; raise --max-tokens (now 8)"
    assert cut_line([output(6, 8), output(2, reason="stop")], [params] * 2, 12) == several


def test_summary_of_little() -> None:
    metrics = RequestMetrics(arrival_time=1.0, first_token_time=1.5, finished_time=1.5)
    metrics.num_output_tokens = 1
    assert summary([metrics], 0.5) == "1 token in 0.50 s; TTFT 500.0 ms"
