"""The Python API: prompts in, outputs back, everything in this process."""

import inspect
import itertools
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jinfer.arguments.vllm import translated
from jinfer.config import EngineConfig
from jinfer.engine.callers import Callers
from jinfer.engine.engine import Engine
from jinfer.engine.metrics import MetricsSnapshot
from jinfer.engine.replicas import Replicas
from jinfer.engine.running import Request
from jinfer.errors import RequestError, shown, unknown_keyword
from jinfer.request.chat import ChatRenderer, choose_template
from jinfer.request.output import RequestMetrics, RequestOutput, new_since
from jinfer.request.params import SamplingParams, priorities_for
from jinfer.request.prompt import Prompt, as_prompt, checked_salt, split_prompts
from jinfer.shipped import DEFAULT_MODEL

Params = SamplingParams | Sequence[SamplingParams] | None
Message = Mapping[str, Any]

_NUMBERS = (int, float, np.generic)


class LLM:
    """A loaded and compiled model that answers prompts, with vLLM's names and meanings.

    Use it from one thread; `AsyncLLM` serves concurrent callers. `with LLM(...) as llm:` or
    `close()` frees the device, so that another model can be loaded in the same process.

    Args:
      model: a Hugging Face folder, a hub name "org/name", or the name of a shipped model.
      **engine_args: fields of `jinfer.config.EngineConfig`, such as `max_model_len`,
        `max_num_seqs`, `dtype`, `load_format`, `seed`; and arguments of vLLM whose value is what
        jinfer does anyway (see `jinfer.arguments.vllm`).

    Raises:
      CheckpointError: the folder holds no model, or is damaged.
      ValueError: an argument is out of range, or there is no room for the KV cache.
      NotImplementedError: jinfer does not support the architecture, or a value of a vLLM
        argument.
      TypeError: an argument has no such name.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, **engine_args: Any) -> None:
        config = engine_config(model, engine_args)
        # Several replicas have the interface of one engine.
        self.engine = Engine(config) if config.data_parallel_size == 1 else Replicas(config)
        self._callers = Callers(self.engine)
        self._renderer = ChatRenderer()
        self._ids = itertools.count()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the device memory. Idempotent; the object cannot be used afterwards."""
        self._renderer.close()
        with self._callers.changing():
            self.engine.close()

    def reset_prefix_cache(self) -> None:
        """Clears the prefix cache, so that the next prompts are computed whole."""
        with self._callers.changing():
            self.engine.reset_prefix_cache()

    def metrics(self) -> MetricsSnapshot:
        """Running and waiting requests now, counts and times since the start; cheap, always on."""
        return self.engine.metrics()

    def prometheus(self) -> str:
        """The metrics in Prometheus text format, with vLLM's names after "jinfer:"."""
        return self.metrics().prometheus(str(self.engine.config.model))

    def get_tokenizer(self) -> Any:
        """The tokenizer, or None under skip_tokenizer_init."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults from the checkpoint's generation_config.json; used if none are given."""
        return SamplingParams.from_defaults(self.engine.defaults.sampling)

    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        on_error: str = "raise",
    ) -> list[RequestOutput]:
        """Answers prompts; returns one output per prompt, in the order of the prompts.

        Args:
          prompts: text, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}, or a
            list of those.
          sampling_params: one for all, or a list with one per prompt; None = the checkpoint's.
          use_tqdm: shows progress with input and output tokens per second.
          priority: one integer per prompt; lower numbers start earlier and are preempted later.
            None = all equal. No prompt waits forever, whatever its priority.
          on_error: "raise": a prompt that cannot be served raises before any work is done.
            "return": its output has an `error` with the reason, and the others are answered.

        Raises:
          RequestError: with "raise", for the first prompt that cannot be served.
          RuntimeError: the LLM was closed, or its device failed.
        """
        units = _units(prompts, on_error)
        return self._generate(units, sampling_params, use_tqdm, on_error, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        on_error: str = "raise",
        **template_args: Any,
    ) -> list[RequestOutput]:
        """Answers conversations, rendered with the checkpoint's chat template.

        Args:
          messages: one conversation, a list of {"role": ..., "content": ...}, or a list of them.
          sampling_params: as in `generate`.
          use_tqdm: as in `generate`.
          on_error: as in `generate`.
          **template_args: `chat_template` (source or name), `add_generation_prompt` (default True),
            `continue_final_message`, `tools`, `documents`, `chat_template_kwargs`; and
            `cache_salt`, which keeps the cached prefixes of one tenant apart.
        """
        check_template_args(template_args)
        conversations = messages if _are_conversations(messages) else [messages]
        units: list[Any] = [
            _caught(lambda c=c: self.render(c, **template_args), on_error) for c in conversations
        ]
        return self._generate(units, sampling_params, use_tqdm, on_error)

    def stream(
        self, prompt: Any, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answers one prompt; yields its output so far after every token, at last the final one.

        `SamplingParams.output_kind` selects only the new part of each output, or only the final
        output. Leaving the loop early ends the request.
        """
        request = self.prepare(as_prompt(prompt), sampling_params)  # raises here, not in the loop
        request.streams = not request.final_only
        return self._stream(request)

    def _stream(self, request: Request) -> Generator[RequestOutput, None, None]:
        before = None
        with self._callers.running([request]) as steps:
            for _ in steps:
                self._raise_failure(request)
                if request.final_only and not request.finished:
                    continue
                output = request.output()
                yield new_since(output, before) if request.wants_delta else output
                before = output

    def as_completed(
        self, prompts: Any, sampling_params: Params = None, *, on_error: str = "raise"
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Answers prompts; yields (index in `prompts`, output) in the order they finish."""
        outcomes = self._prepare_all(_units(prompts, on_error), sampling_params, on_error)
        places = {o: i for i, o in enumerate(outcomes) if isinstance(o, Request)}
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, RequestOutput):
                yield place, outcome
        with self._callers.running(list(places)) as steps:
            for advanced in steps:
                for request in advanced:
                    if request.finished:
                        self._raise_failure(request, on_error)
                        yield places[request], request.output()

    def _generate(
        self,
        units: Sequence[Any],
        params: Params,
        use_tqdm: bool,
        on_error: str,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        outcomes = self._prepare_all(units, params, on_error, priority)
        requests = [outcome for outcome in outcomes if isinstance(outcome, Request)]
        shown = use_tqdm and self.engine.config.progress
        with _ProgressLine(len(requests), shown) as line, self._callers.running(requests) as steps:
            for advanced in steps:
                line.update(advanced)
        for request in requests:
            self._raise_failure(request, on_error)
        return [o.output() if isinstance(o, Request) else o for o in outcomes]

    def render(
        self,
        messages: Any,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Any = None,
        documents: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str = "",
    ) -> Prompt:
        """Renders one conversation to a prompt, as `chat` does.

        Raises:
          RequestError: there is no template, it rejects the messages, or it exceeds a limit.
        """
        self.engine.require_alive()
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise RequestError(
                "chat needs a tokenizer; got skip_tokenizer_init=True. "
                "Render the chat yourself and pass prompt_token_ids to generate()."
            )
        if chat_template is None or (isinstance(chat_template, str) and "{" not in chat_template):
            chat_template = choose_template(
                tokenizer.chat_templates, name=chat_template, tools=tools
            )
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise RequestError(
                f"chat_template_kwargs must be a dict; got {shown(chat_template_kwargs)}. "
                'Pass such as {"enable_thinking": False}.'
            )
        named = {"bos_token": "", "eos_token": "", **tokenizer.template_variables}
        text = self._renderer.render(
            chat_template,
            messages,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            variables={**named, **(chat_template_kwargs or {})},
        )
        # The template writes the special tokens itself.
        token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        return Prompt(text=text, token_ids=token_ids, cache_salt=checked_salt(cache_salt))

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Request:
        """Checks a request fully and returns it for `engine.add`; queues nothing.

        Raises:
          RequestError: the prompt or a parameter is invalid or not supported.
        """
        params = self.get_default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params must be SamplingParams; got {type(params).__name__}. "
                "Build them with jinfer.SamplingParams(...)."
            )
        if request_id is None:
            request_id = str(next(self._ids))
        return self.engine.prepare(request_id, prompt, params, priority)

    def _prepare_all(
        self,
        units: Sequence[Any],
        params: Params,
        on_error: str,
        priority: Sequence[int] | None = None,
    ) -> list[Request | RequestOutput]:
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error must be 'raise' or 'return'; got {on_error=}. Choose one.")
        each = zip(_params_for(units, params), priorities_for(len(units), priority), strict=True)
        return [
            unit
            if isinstance(unit, RequestOutput)
            else _caught(lambda u=unit, p=p, r=r: self.prepare(u, p, priority=r), on_error, unit)
            for unit, (p, r) in zip(units, each, strict=True)
        ]

    def _raise_failure(self, request: Request, on_error: str = "raise") -> None:
        if request.error is not None and on_error == "raise":
            raise request.error


class _ProgressLine:
    """`Processed prompts: 12/40, input 350 tok/s, output 410 tok/s`."""

    def __init__(self, num_requests: int, shown: bool) -> None:
        self._bar = tqdm(
            total=num_requests,
            desc="Processed prompts",
            disable=not shown or num_requests == 0,
            dynamic_ncols=True,
            postfix="input 0 tok/s, output 0 tok/s",
        )
        self._num_input = self._num_output = 0

    def __enter__(self) -> "_ProgressLine":
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


def engine_config(model: str | Path, engine_args: Mapping[str, Any]) -> EngineConfig:
    """An EngineConfig from keyword arguments; an unknown name raises, with the nearest name."""
    engine_args = translated(engine_args)
    known = [field.name for field in fields(EngineConfig)]
    for name in engine_args:
        if name not in known:
            raise unknown_keyword("LLM", name, known)
    return EngineConfig(model=model, **engine_args)


def check_template_args(template_args: Mapping[str, Any]) -> None:
    """Raises for a keyword of `chat` that `LLM.render` does not take, with the nearest name."""
    parameters = inspect.signature(LLM.render).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    for name in template_args:
        if name not in known:
            raise unknown_keyword("chat", name, known)


def _units(prompts: Any, on_error: str) -> list[Prompt | RequestOutput]:
    """Each prompt as a `Prompt`; with "return", an invalid one as an output with its error."""
    try:
        return list(split_prompts(prompts)[0])
    except RequestError:
        if on_error == "raise":
            raise
    # A flat list of numbers is one invalid prompt; any other list is many prompts.
    many = isinstance(prompts, list | tuple) and not all(isinstance(p, _NUMBERS) for p in prompts)
    each = prompts if many else [prompts]
    return [_caught(lambda p=p: as_prompt(p), on_error) for p in each]


def _are_conversations(messages: Any) -> bool:
    """Whether `messages` is a list of conversations, not one conversation."""
    listed = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    return listed and not any(isinstance(message, Mapping) for message in messages)


def _params_for(units: Sequence[Any], params: Params) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * len(units)
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(
            "sampling_params must be SamplingParams or a list of them; "
            f"got {type(params).__name__}. Build them with jinfer.SamplingParams(...)."
        )
    if len(params) != len(units):
        raise RequestError(
            "a list of sampling_params needs one entry per prompt; "
            f"got {len(params)} for {len(units)} prompts. Pass one SamplingParams for all."
        )
    return params


def _caught(make: Any, on_error: str, prompt: Prompt | None = None) -> Any:
    """Returns `make()`; with on_error="return", its error becomes an output."""
    try:
        return make()
    except RequestError as error:
        if on_error == "raise":
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
