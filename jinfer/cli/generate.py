"""`jinfer generate`: prompts in, text or JSON out."""

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from jinfer.cli.arguments import engine_args, sampling_args
from jinfer.cli.profile import profiled, require_profile_folder
from jinfer.cli.prompts import read_prompts
from jinfer.cli.screen import counted, milliseconds, note, show
from jinfer.errors import RequestError
from jinfer.llm import LLM
from jinfer.request.output import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt

# Up to this many, the engine gets sizes that fit: fewer programs to compile, a faster start.
FEW_SEQUENCES = 8
# A step scores at most one prompt token per slot.
SCORING_SLOTS = 32
MIN_STEP_TOKENS, MAX_STEP_TOKENS = 8, 512


def generate(args: Namespace) -> int:
    """Answers the prompts of one command; returns 2 if one of several was refused, else 0."""
    prompts = read_prompts(args.prompts, args.file)
    if len(prompts) == 1 and not prompts[0].text and not prompts[0].token_ids:
        raise RequestError("a prompt needs at least one token; got none. Write some text.")
    chosen = sampling_args(args)
    params = SamplingParams(**chosen)  # raises before the model is loaded
    if not args.json:
        _refuse_unshown(args, params)
    require_profile_folder(args.profile)
    asked = {**made_to_measure(prompts, params.n, args), **engine_args(args)}
    with LLM(args.model, **asked) as llm:
        params = replace(llm.get_default_sampling_params(), **chosen)
        start_s = time.monotonic()
        with profiled(args.profile):
            if len(prompts) == 1 and params.n == 1 and not args.json:
                outputs = [_stream(llm, prompts[0], params)]
            else:
                outputs = _print_in_order(llm, prompts, params, args.json)
        elapsed_s = time.monotonic() - start_s
    served = [output.metrics for output in outputs if output.error is None]
    if served and not args.quiet:
        note(summary(served, elapsed_s))
    return 2 if len(served) < len(prompts) else 0


def made_to_measure(prompts: Sequence[Prompt], n: int, args: Namespace) -> dict[str, int]:
    """Engine sizes for a few sequences; empty for many sequences, or if the user chose sizes."""
    num_sequences = len(prompts) * n
    if num_sequences > FEW_SEQUENCES or "max_num_seqs" in args or "max_num_batched_tokens" in args:
        return {}
    # English has three to five characters per token; a longer prompt goes in chunks.
    longest = max(len(p.token_ids) if p.token_ids else len(p.text or "") // 3 for p in prompts)
    num_slots = SCORING_SLOTS if "prompt_logprobs" in args else num_sequences
    least = max(MIN_STEP_TOKENS, num_slots)
    step_tokens = min(max(least, 1 << longest.bit_length()), MAX_STEP_TOKENS)
    return {"max_num_seqs": num_slots, "max_num_batched_tokens": step_tokens}


def as_json(output: RequestOutput) -> dict[str, Any]:
    """The JSON object of one prompt, as --json prints it."""
    said: dict[str, Any] = {"prompt": output.prompt}
    if output.prompt is None:
        said["prompt_token_ids"] = list(output.prompt_token_ids)
    if output.error is not None:
        return {**said, "error": str(output.error)}
    completions = [_completion_json(completion) for completion in output.outputs]
    said |= completions[0] if len(completions) == 1 else {"outputs": completions}
    if output.prompt_logprobs is not None:
        said["prompt_logprobs"] = _logprobs_json(output.prompt_logprobs)
    return {**said, "metrics": _metrics_json(output.metrics)}


def summary(served: Sequence[RequestMetrics], elapsed_s: float) -> str:
    """The last line: number of tokens, and their speed."""
    num_tokens = sum(metrics.num_output_tokens for metrics in served)
    ttft_s = [metrics.ttft_s for metrics in served if metrics.ttft_s is not None]
    tpot_s = [metrics.tpot_s for metrics in served if metrics.tpot_s is not None]
    median = "" if len(served) == 1 else "median "
    told = [
        f"{median}{name} {milliseconds(statistics.median(values))}"
        for name, values in (("TTFT", ttft_s), ("TPOT", tpot_s))
        if values
    ]
    prompts = "" if len(served) == 1 else f"{counted(len(served), 'prompt')}, "
    tokens = f"{prompts}{counted(num_tokens, 'token')} in {elapsed_s:.2f} s"
    return "; ".join([tokens, ", ".join(told)])


def _refuse_unshown(args: Namespace, params: SamplingParams) -> None:
    """Refuses flags whose output only --json shows."""
    asked = {
        "--logprobs": params.logprobs is not None,
        "--prompt-logprobs": params.prompt_logprobs is not None,
        "--no-detokenize": not params.detokenize,
        "--skip-tokenizer-init": "skip_tokenizer_init" in args,
    }
    for flag, is_asked in asked.items():
        if is_asked:
            raise RequestError(f"{flag} is shown by --json only; got no --json. Add it.")


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams) -> RequestOutput:
    outputs = llm.stream(prompt, params)  # raises if refused, before anything is shown
    show(prompt.text or "", dim=True)
    shown, output = 0, None
    for output in outputs:
        text = output.outputs[0].text
        show(text[shown:])
        shown = len(text)
    show("\n")
    assert output is not None, "a stream that ended without an output"
    return output


def _print_in_order(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, wants_json: bool
) -> list[RequestOutput]:
    on_error = "raise" if len(prompts) == 1 else "return"
    outputs = []
    for output in _in_order(llm.as_completed(prompts, params, on_error=on_error)):
        outputs.append(output)
        if wants_json:
            show(json.dumps(as_json(output), ensure_ascii=False) + "\n")
        else:
            _print_text(output, is_first=len(outputs) == 1)
        if output.error is not None:
            note(f"error: prompt {len(outputs)}: {output.error}")
    return outputs


def _in_order(completed: Iterable[tuple[int, RequestOutput]]) -> Iterator[RequestOutput]:
    """Yields outputs in the order of the prompts, each as soon as all earlier ones are out."""
    waiting: dict[int, RequestOutput] = {}
    num_passed = 0
    for place, output in completed:
        waiting[place] = output
        while num_passed in waiting:
            yield waiting.pop(num_passed)
            num_passed += 1


def _print_text(output: RequestOutput, *, is_first: bool) -> None:
    for completion in output.outputs:
        show("" if is_first and completion.index == 0 else "\n")
        show(output.prompt or "", dim=True)
        show(completion.text + "\n")


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
