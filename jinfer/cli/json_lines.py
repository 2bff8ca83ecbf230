"""The lines of `jinfer generate --json`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jinfer.cli.prompts import Entry
from jinfer.request.output import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def as_json(entry: Entry, output: RequestOutput) -> dict[str, Any]:
    """The JSON object of one prompt: its answer, or its error."""
    said: dict[str, Any] = {} if entry.entry_id is None else {"id": entry.entry_id}
    if entry.messages is not None:
        said["messages"] = entry.messages
    if output.prompt is not None or entry.messages is None:
        said["prompt"] = output.prompt
    if output.prompt is None and entry.messages is None:
        said["prompt_token_ids"] = list(output.prompt_token_ids)
    if output.error is not None:
        return {**said, "error": str(output.error)}
    completions = [_completion_json(completion) for completion in output.outputs]
    said |= completions[0] if len(completions) == 1 else {"outputs": completions}
    if output.prompt_logprobs is not None:
        said["prompt_logprobs"] = _logprobs_json(output.prompt_logprobs)
    return {**said, "metrics": _metrics_json(output.metrics)}


def _completion_json(completion: CompletionOutput) -> dict[str, Any]:
    said: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        said["cumulative_logprob"] = completion.cumulative_logprob
        said["logprobs"] = _logprobs_json(completion.logprobs)
    return said


def _logprobs_json(positions: Sequence[dict[int, Logprob] | None]) -> list[Any]:
    return [
        None
        if position is None
        else [{"token_id": token_id, **asdict(entry)} for token_id, entry in position.items()]
        for position in positions
    ]


def _metrics_json(metrics: RequestMetrics) -> dict[str, Any]:
    names = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens")
    times = ("queue_s", "ttft_s", "tpot_s", "e2e_s")
    return {name: getattr(metrics, name) for name in (*names, *times)}
