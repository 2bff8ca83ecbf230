"""Arguments of a call for many prompts, one entry per prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jinfer.errors import RequestError
from jinfer.request.output import RequestMetrics, RequestOutput
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt, as_prompt, split_prompts

_NUMBERS = (int, float, np.generic)


def prompt_units(prompts: Any, on_error: str) -> list[Prompt | RequestOutput]:
    """Each prompt as a `Prompt`; with "return", an invalid one as an output with its error."""
    try:
        return list(split_prompts(prompts)[0])
    except RequestError:
        if on_error == "raise":
            raise
    # A flat list of numbers is one invalid prompt; any other list is many prompts.
    many = isinstance(prompts, list | tuple) and not all(isinstance(p, _NUMBERS) for p in prompts)
    each = prompts if many else [prompts]
    return [caught(lambda p=p: as_prompt(p), on_error) for p in each]


def are_conversations(messages: Any) -> bool:
    """Whether `messages` is a list of conversations, not one conversation."""
    listed = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    return listed and not any(isinstance(message, Mapping) for message in messages)


def params_for(num_units: int, params: Any) -> Sequence[SamplingParams | None]:
    """The parameters of each prompt; None where the checkpoint's defaults count.

    Raises:
      RequestError: they are of another class, or not one per prompt.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_units
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(
            "sampling_params must be SamplingParams or a list of them; "
            f"got {type(params).__name__}. Build them with jinfer.SamplingParams(...)."
        )
    if len(params) != num_units:
        raise RequestError(
            "a list of sampling_params needs one entry per prompt; "
            f"got {len(params)} for {num_units} prompts. Pass one SamplingParams for all."
        )
    return params


def caught(
    make: Callable[[], Any], on_error: str, prompt: Prompt | None = None, place: str = ""
) -> Any:
    """Returns `make()`; with on_error="return", its error becomes an output.

    Args:
      make: may raise RequestError.
      on_error: "raise" or "return".
      prompt: the prompt of that output.
      place: the prompt's place among many, such as "prompt 3"; an error that is raised names it.
    """
    try:
        return make()
    except RequestError as error:
        if on_error == "raise":
            if place:
                raise RequestError(f"{place}: {error}") from None
            raise
        return RequestOutput(
            request_id="",
            prompt=None if prompt is None else prompt.text,
            prompt_token_ids=() if prompt is None else prompt.token_ids or (),
            outputs=[],
            finished=True,
            metrics=RequestMetrics(),
            error=error,
        )
