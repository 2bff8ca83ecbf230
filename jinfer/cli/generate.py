"""`jinfer generate`: prompts in, text or JSON out."""

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jinfer.cli.arguments import engine_args, sampling_args
from jinfer.cli.flag_defaults import MAX_TOKENS
from jinfer.cli.interrupt import at_once
from jinfer.cli.json_lines import as_json
from jinfer.cli.json_text import json_text
from jinfer.cli.profile import profiled, require_profile_folder
from jinfer.cli.progress import Progress
from jinfer.cli.prompts import Entry, read_prompts
from jinfer.cli.screen import counted, milliseconds, note, show
from jinfer.errors import RequestError
from jinfer.llm import LLM
from jinfer.request.output import CompletionOutput, RequestMetrics, RequestOutput
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt
from jinfer.shipped import find_shipped

# Up to this many, the engine gets sizes that fit: fewer programs to compile, a faster start.
FEW_SEQUENCES = 8
# A step scores at most one prompt token per slot.
SCORING_SLOTS = 32
# Few sizes, those of the engine's own programs on CPUs: commands then share kept programs.
STEP_TOKENS = (8, 32, 128, 512)


def generate(args: Namespace) -> int:
    """Answers the prompts of one command; returns 2 if a prompt has no answer, else 0."""
    entries = read_prompts(args.prompts, args.file, chat=args.chat)
    chosen = sampling_args(args)
    asked_params = params_of_each(entries, SamplingParams(), chosen)  # raises before the loading
    if not args.json:
        for entry, params in zip(entries, asked_params, strict=True):
            _refuse_unshown(args, params, entry)
    require_profile_folder(args.profile)
    asked = {**made_to_measure(entries, asked_params, args), **engine_args(args)}
    with at_once(lambda: LLM(args.model, **asked)) as llm:
        if not args.quiet:
            _hint_at_chat(args, llm, entries)
        params = params_of_each(entries, llm.get_default_sampling_params(), chosen)
        start_s = time.monotonic()
        with profiled(args.profile):
            if len(entries) == 1 and params[0].n == 1 and not args.json:
                outputs = [_stream(llm, entries[0], params[0])]
            else:
                outputs = _print_in_order(llm, entries, params, args)
        elapsed_s = time.monotonic() - start_s
        context = llm.engine.plan.max_model_len
    served = [output.metrics for output in outputs if output.error is None]
    if served and not args.quiet:
        if not args.json and (said := cut_line(outputs, params, context)):
            note(said)
        note(summary(served, elapsed_s))
    return 2 if len(served) < len(entries) else 0


def params_of_each(
    entries: Sequence[Entry], defaults: SamplingParams, chosen: Mapping[str, Any]
) -> list[SamplingParams]:
    """The parameters of each entry: the model's defaults, then the flags, then its own line.

    Raises:
      RequestError: values contradict each other.
    """
    if not any(entry.sampling for entry in entries):
        return [_with_limit(defaults, chosen)] * len(entries)
    each = []
    for entry in entries:
        try:
            each.append(_with_limit(defaults, {**chosen, **entry.sampling}))
        except RequestError as error:
            raise RequestError(f"{entry.place}: {error}") from None
    return each


def _with_limit(defaults: SamplingParams, chosen: Mapping[str, Any]) -> SamplingParams:
    params = replace(defaults, **chosen)
    if params.max_tokens is None and "max_tokens" not in chosen:
        params = replace(params, max_tokens=max(MAX_TOKENS["generate"], params.min_tokens))
    return params


def made_to_measure(
    entries: Sequence[Entry], params: Sequence[SamplingParams], args: Namespace
) -> dict[str, int]:
    """Engine sizes for a few sequences; empty for many, or if `--max-num-seqs` is given."""
    num_sequences = sum(each.n for each in params)
    if num_sequences > FEW_SEQUENCES or "max_num_seqs" in args:
        return {}
    scores = any(each.prompt_logprobs is not None for each in params)
    num_slots = SCORING_SLOTS if scores else num_sequences
    if "max_num_batched_tokens" in args:
        # A step needs a token for each slot. If this is no number, the engine refuses it later.
        most = args.max_num_batched_tokens
        return {"max_num_seqs": min(num_slots, max(1, most)) if isinstance(most, int) else 1}
    longest = max(map(_length, entries))
    least = max(num_slots, longest + 1)
    step_tokens = next((size for size in STEP_TOKENS if size >= least), STEP_TOKENS[-1])
    return {"max_num_seqs": num_slots, "max_num_batched_tokens": step_tokens}


def _length(entry: Entry) -> int:
    """An estimate of the prompt's tokens; a longer prompt goes in chunks."""
    # English has three to five characters per token.
    if entry.prompt is None:
        return len(str(entry.messages)) // 3
    return len(entry.prompt.token_ids or ()) or len(entry.prompt.text or "") // 3


def cut_line(
    outputs: Sequence[RequestOutput], params: Sequence[SamplingParams], context: int
) -> str | None:
    """Says how many outputs end at a limit instead of their own end; None if none does."""
    done = [
        (output, completion, each)
        for output, each in zip(outputs, params, strict=True)
        if output.error is None
        for completion in output.outputs
    ]
    cut = [one for one in done if one[1].finish_reason == "length"]
    if not cut:
        return None
    full = [one for one in cut if _fills(one[0], one[1], context)]
    which = "the output was" if len(done) == 1 else f"{len(cut):,} of {len(done):,} outputs were"
    if len(full) == len(cut):
        return f"{which} cut: the context of {counted(context, 'token')} is full"
    limits = {each.max_tokens for _, _, each in cut}
    limit = f" (now {limits.pop()})" if len(limits) == 1 else ""
    return f"{which} cut at the limit; raise --max-tokens{limit}"


def _fills(output: RequestOutput, completion: CompletionOutput, context: int) -> bool:
    return len(output.prompt_token_ids) + len(completion.token_ids) >= context


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


def _hint_at_chat(args: Namespace, llm: LLM, entries: Sequence[Entry]) -> None:
    """Says once that the model was made for chats, if a text would be completed instead."""
    tokenizer = llm.get_tokenizer()
    if args.chat or find_shipped(args.model) is not None or tokenizer is None:
        return
    if tokenizer.chat_templates and any(e.prompt and e.prompt.text is not None for e in entries):
        note("this model has a chat template; with --chat each prompt is a message to it")


def _refuse_unshown(args: Namespace, params: SamplingParams, entry: Entry) -> None:
    """Refuses parameters whose output only --json shows."""
    asked = {
        "logprobs": params.logprobs is not None,
        "prompt_logprobs": params.prompt_logprobs is not None,
        "detokenize": not params.detokenize,
        "skip_tokenizer_init": "skip_tokenizer_init" in args,
    }
    for name, is_asked in asked.items():
        if is_asked and name in entry.sampling:
            raise RequestError(
                f'{entry.place}: "{name}" is shown by --json only; got no --json. Add it.'
            )
        if is_asked:
            flag = f"--{'no-' if name == 'detokenize' else ''}{name.replace('_', '-')}"
            raise RequestError(f"{flag} is shown by --json only; got no --json. Add it.")


def _prompt(llm: LLM, entry: Entry) -> Prompt:
    if entry.prompt is not None:
        return entry.prompt
    return llm.render(entry.messages, **entry.template_args)


def _stream(llm: LLM, entry: Entry, params: SamplingParams) -> RequestOutput:
    try:
        prompt = _prompt(llm, entry)
        outputs = llm.stream(prompt, params)  # raises if refused, before anything is shown
    except RequestError as error:
        raise _with_place(error, entry) from None
    if entry.prompt is not None:  # the output continues this text; an answer stands alone
        show(prompt.text or "", dim=True)
    shown, output = 0, None
    try:
        for output in outputs:
            text = output.outputs[0].text
            show(text[shown:])
            shown = len(text)
    except RequestError as error:
        show("\n")  # the error gets a line of its own
        raise _with_place(error, entry) from None
    show("\n")
    assert output is not None, "a stream that ended without an output"
    return output


def _with_place(error: RequestError, entry: Entry) -> RequestError:
    """The error with its line of the file; a single prompt on the command line needs none."""
    return error if entry.place == "prompt 1" else RequestError(f"{entry.place}: {error}")


def _print_in_order(
    llm: LLM, entries: Sequence[Entry], params: Sequence[SamplingParams], args: Namespace
) -> list[RequestOutput]:
    is_shown = len(entries) > 1 and not args.quiet and not sys.stdout.isatty()
    outputs: list[RequestOutput] = []
    with Progress(len(entries), shown=is_shown) as progress:
        completed = _counted(_completed(llm, entries, params), progress)
        for output in _in_order(completed):
            entry = entries[len(outputs)]
            outputs.append(output)
            if args.json:
                show(json_text(as_json(entry, output)) + "\n")
            elif output.error is None:
                number = len(outputs) if len(entries) > 1 else None
                _print_text(entry, output, number, is_first=len(outputs) == 1)
            if output.error is not None:
                progress.note(f"error: {entry.place}: {output.error}")
    return outputs


def _completed(
    llm: LLM, entries: Sequence[Entry], params: Sequence[SamplingParams]
) -> Iterator[tuple[int, RequestOutput]]:
    """The place of each entry and its output, as they finish; refused conversations first."""
    places, prompts = [], []
    for place, entry in enumerate(entries):
        try:
            prompts.append(_prompt(llm, entry))
            places.append(place)
        except RequestError as error:
            yield place, _refused(error)
    asked = [params[place] for place in places]
    for place, output in llm.as_completed(prompts, asked, on_error="return"):
        yield places[place], output


def _refused(error: RequestError) -> RequestOutput:
    return RequestOutput(
        request_id="",
        prompt=None,
        prompt_token_ids=(),
        outputs=[],
        finished=True,
        metrics=RequestMetrics(),
        error=error,
    )


def _counted(
    completed: Iterable[tuple[int, RequestOutput]], progress: Progress
) -> Iterator[tuple[int, RequestOutput]]:
    for place, output in completed:
        progress.count(output)
        yield place, output


def _in_order(completed: Iterable[tuple[int, RequestOutput]]) -> Iterator[RequestOutput]:
    """Yields outputs in the order of the prompts, each as soon as all earlier ones are out."""
    waiting: dict[int, RequestOutput] = {}
    num_passed = 0
    for place, output in completed:
        waiting[place] = output
        while num_passed in waiting:
            yield waiting.pop(num_passed)
            num_passed += 1


def _print_text(entry: Entry, output: RequestOutput, number: int | None, *, is_first: bool) -> None:
    """Prints each output; with several per prompt, "[2]" or "[3.2]" stands before it.

    Args:
      entry: the prompt.
      output: its outputs.
      number: of the prompt, from 1; None for the only one.
      is_first: nothing was printed before.
    """
    has_several = len(output.outputs) > 1
    for completion in output.outputs:
        show("" if is_first and completion.index == 0 else "\n")
        if has_several:
            show(f"[{'' if number is None else f'{number}.'}{completion.index + 1}] ")
        show(_shown_prompt(entry, output), dim=True)
        show(completion.text + "\n")


def _shown_prompt(entry: Entry, output: RequestOutput) -> str:
    """The text that the output continues, or the message that it answers."""
    if entry.prompt is not None:
        return output.prompt or ""
    last = entry.messages[-1].get("content")
    return f"{last}\n" if isinstance(last, str) else ""
