"""The progress bar of `LLM.generate`."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tqdm import tqdm

from jinfer.engine.running import Request
from jinfer.log import screen

UseTqdm = bool | Callable[..., Any]  # a function makes the bar, with the keywords of tqdm


class ProgressLine:
    """`Processed prompts: 12/40, input 350 tok/s, output 410 tok/s`."""

    def __init__(self, num_requests: int, shown: UseTqdm) -> None:
        make = shown if callable(shown) else partial(tqdm, file=screen())
        self._bar = make(
            total=num_requests,
            desc="Processed prompts",
            disable=not shown or num_requests == 0,
            dynamic_ncols=True,
            postfix="input 0 tok/s, output 0 tok/s",
        )
        self._num_input = self._num_output = 0

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def update(self, advanced: Iterable[Request]) -> None:
        """Counts the requests that finished in this step."""
        finished = [request for request in advanced if request.finished]
        if not finished or self._bar.disable:
            return
        self._num_input += sum(len(request.prompt_ids) for request in finished)
        self._num_output += sum(request.metrics.num_output_tokens for request in finished)
        elapsed_s = max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(
            f"input {self._num_input / elapsed_s:,.0f} tok/s, "
            f"output {self._num_output / elapsed_s:,.0f} tok/s",
            refresh=False,
        )
        self._bar.update(len(finished))
