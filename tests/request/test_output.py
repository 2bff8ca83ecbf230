"""What a request returns: names, durations and how it prints."""

import time

import pytest

from jinfer.request.output import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jinfer.request.stop import Finish


def test_durations() -> None:
    metrics = RequestMetrics(
        arrival_time=10.0,
        first_scheduled_time=10.5,
        first_token_time=11.0,
        finished_time=15.0,
        num_output_tokens=5,
    )
    assert (metrics.queue_s, metrics.ttft_s, metrics.e2e_s, metrics.tpot_s) == (0.5, 1.0, 5.0, 1.0)


@pytest.mark.parametrize("num_output_tokens", [0, 1])
def test_no_time_per_token_without_a_second_token(num_output_tokens: int) -> None:
    metrics = RequestMetrics(
        arrival_time=0.0,
        first_token_time=1.0,
        finished_time=1.0,
        num_output_tokens=num_output_tokens,
    )
    assert metrics.tpot_s is None


def test_a_fresh_request_has_only_arrived() -> None:
    before = time.time()
    metrics = RequestMetrics()
    assert metrics.queue_s is metrics.ttft_s is metrics.e2e_s is metrics.tpot_s is None
    assert before - 1 <= metrics.wall_origin + metrics.arrival_time <= time.time() + 1


def test_finished_follows_the_reason() -> None:
    output = CompletionOutput(index=0, text="", token_ids=[])
    assert not output.finished()
    output.finish_reason = "stop"
    assert output.finished()


def test_prints_on_one_readable_line() -> None:
    completion = CompletionOutput(
        index=0,
        text="hi",
        token_ids=(1, 2),
        logprobs=[{1: Logprob(-0.5, 1, "h")}, {2: Logprob(-0.5, 1, "i")}],
        finish_reason=Finish.STOP,
        stop_reason="\n",
    )
    assert repr(completion) == (
        "CompletionOutput(index=0, text='hi', token_ids=[1, 2], cumulative_logprob=None, "
        "finish_reason='stop', stop_reason='\\n')"
    )
    output = RequestOutput(
        request_id="7",
        prompt="p" * 300,
        prompt_token_ids=range(100),
        outputs=[completion],
        finished=True,
        metrics=RequestMetrics(),
    )
    text = repr(output)
    assert text.startswith("RequestOutput(request_id='7', prompt='ppp")
    assert "... (300 characters), prompt_token_ids=[0, 1, 2," in text
    assert "15, ... (100 ids)]" in text and "error" not in text
    assert text.endswith("finished=True, num_cached_tokens=0)")
    output.error = ValueError("no")
    assert repr(output).endswith("error=ValueError('no'))")
    assert "finish_reason=None" in repr(CompletionOutput(index=0, text="", token_ids=[]))
