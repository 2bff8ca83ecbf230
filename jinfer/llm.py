"""The Python API: prompts in, outputs back, everything in this process."""

import inspect
import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from jinfer.arguments.chat_template import read_chat_template
from jinfer.arguments.engine_args import EngineArgs, keywords_of
from jinfer.arguments.keywords import ChatKeywords, EngineKeywords, full_signature
from jinfer.arguments.vllm import engine_config
from jinfer.arguments.vllm_methods import missing_attribute, require_absent
from jinfer.engine.callers import Callers
from jinfer.engine.engine import Engine
from jinfer.engine.metrics import MetricsSnapshot
from jinfer.engine.progress_line import ProgressLine, UseTqdm
from jinfer.engine.replicas import Replicas
from jinfer.engine.running import Request
from jinfer.errors import RequestError, shown, unknown_keyword
from jinfer.request.apply_template import apply_template
from jinfer.request.chat import ChatRenderer
from jinfer.request.output import RequestOutput, new_since
from jinfer.request.params import SamplingParams, priorities_for
from jinfer.request.prompt import Prompt, as_prompt, checked_salt
from jinfer.request.units import are_conversations, caught, params_for, prompt_units
from jinfer.shipped import DEFAULT_MODEL

Params = SamplingParams | Sequence[SamplingParams] | None
Message = Mapping[str, Any]
Priority = int | Sequence[int] | None


class LLM:
    """A loaded and compiled model that answers prompts, with vLLM's names and meanings.

    Use it from one thread; `AsyncLLM` serves concurrent callers. `with LLM(...) as llm:` or
    `close()` frees the device, so that another model can be loaded in the same process.

    Args:
      model: a Hugging Face folder, a hub name "org/name", or a shipped model.
      revision: branch, tag or commit of the model on the hub; None = "main".
      tokenizer: a folder or a hub name; None = the model's own.
      tokenizer_revision: the same for the tokenizer; None = `revision`, if the tokenizer is the
        model's own.
      chat_template: a file, the template itself, or the name of one of the checkpoint's; None = the
        checkpoint's.
      download_dir: folder for downloads; None = the hub's cache.
      hf_token: access token for the hub; None or True = the one of `hf auth login`, False = none.
      skip_tokenizer_init: True: no tokenizer; prompts must be token ids.
      load_format: "auto" and "safetensors" read the checkpoint; "dummy" makes random weights.
      hf_overrides: keys that win over those of config.json, such as {"rope_theta": 1000000.0}.
      dtype: of weights and activations: "float32", "bfloat16", "float16"; "auto": float32 on a CPU,
        else bfloat16.
      kv_cache_dtype: of the KV cache: "int8", "fp8" = "fp8_e4m3"; "auto": as dtype.
      tensor_parallel_size: chips that share one model.
      data_parallel_size: replicas of the model, each on chips of its own.
      max_model_len: tokens of prompt and output together; None = as much of the trained context as
        fits.
      max_num_seqs: slots: sequences that run at the same time.
      max_num_batched_tokens: most tokens of one step.
      max_decode_steps: most decode steps of one dispatch.
      long_prefill_token_threshold: most tokens of one prompt in one step; None =
        max_num_batched_tokens.
      ttft_target_ms: goal: milliseconds from arrival to the first token.
      tpot_target_ms: goal: mean milliseconds between a request's tokens.
      enable_prefix_caching: compute a common prefix of prompts once.
      kv_offloading_size: GiB of host memory for evicted KV pages.
      page_size: tokens per page of the KV cache.
      num_pages: pages of the KV cache; None = what fits into memory.
      gpu_memory_utilization: fraction of the device's free memory to use.
      kv_cache_memory_bytes: of the KV cache on each chip; gpu_memory_utilization then does not
        count.
      seed: for requests without a seed, and for dummy weights.
      generation_config: defaults of SamplingParams: "auto" = the checkpoint's, "vllm" = none, or
        the folder of a generation_config.json.
      override_generation_config: keys that win over those of generation_config.json, such as
        {"temperature": 0.7}.
      max_logprobs: limit on a request's `logprobs` and `prompt_logprobs`; at most 100.
      layer_loop: how the layers are compiled: "scan" = one after another in a loop, "unrolled".
      attention: name of a paged-attention implementation.
      compilation_cache: folder for compiled programs; None = the user's cache directory.
      late_compile: when a program is compiled after start-up: "warn" | "error".
      enforce_eager: start sooner: compile with less effort, for slower steps; None = only on a CPU,
        for models of less than 20 million parameters.
      disable_log_stats: no line about the load every 10 seconds.
      progress: progress bars and start-up lines.
      Further keywords may be arguments of vLLM, renamed or with values that describe what jinfer
        does anyway; `docs/from_vllm.md` lists all of them.

    Raises:
      CheckpointError: the folder holds no model, or is damaged.
      ValueError: an argument is out of range, or there is no room for the KV cache.
      NotImplementedError: jinfer does not support the architecture, or a value of a vLLM
        argument.
      TypeError: an argument has no such name. The message names every such argument.
    """

    __signature__ = full_signature()

    def __init__(
        self, model: str | Path = DEFAULT_MODEL, **engine_args: Unpack[EngineKeywords]
    ) -> None:
        of_requests = [field.name for field in fields(SamplingParams)]
        config = engine_config(model, engine_args, of_requests=of_requests)
        self._chat_template = read_chat_template(config.chat_template)
        # Several replicas have the interface of one engine.
        self.engine = Engine(config) if config.data_parallel_size == 1 else Replicas(config)
        self._callers = Callers(self.engine)
        self._renderer = ChatRenderer()
        self._ids = itertools.count()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLM":
        """The same as `LLM(**vars(engine_args))`."""
        return cls(**keywords_of(engine_args))

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM(model={str(self.engine.config.model)!r})"

    if not TYPE_CHECKING:  # type checkers shall still find misspelt attributes

        def __getattr__(self, name: str) -> Any:
            raise missing_attribute("LLM", name)

    def close(self) -> None:
        """Frees the device memory. Idempotent; the object cannot be used afterwards."""
        self._renderer.close()
        with self._callers.changing():
            self.engine.close()

    def reset_prefix_cache(self) -> bool:
        """Clears the prefix cache, so that the next prompts are computed whole; returns True."""
        with self._callers.changing():
            self.engine.reset_prefix_cache()
        return True

    def metrics(self) -> MetricsSnapshot:
        """Running and waiting requests now, counts and times since the start; cheap, always on."""
        return self.engine.metrics()

    def prometheus(self) -> str:
        """The metrics in Prometheus text format, with vLLM's names after "jinfer:"."""
        return self.metrics().prometheus(str(self.engine.config.model))

    def get_tokenizer(self) -> Any:
        """The tokenizer, or None under skip_tokenizer_init."""
        return self.engine.tokenizer

    def get_world_size(self, include_dp: bool = True) -> int:
        """The number of chips in use: of all replicas, or of one without `include_dp`."""
        config = self.engine.config
        return config.tensor_parallel_size * (config.data_parallel_size if include_dp else 1)

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults from the checkpoint's generation_config.json; used if none are given."""
        return SamplingParams.from_defaults(self.engine.defaults.sampling)

    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: Priority = None,
        *,
        on_error: str = "raise",
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answers prompts; returns one output per prompt, in the order of the prompts.

        Args:
          prompts: text, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}, or a
            list of those.
          sampling_params: one for all, or a list with one per prompt; None = the checkpoint's.
          use_tqdm: shows progress with input and output tokens per second; or a function that
            makes the bar, in place of `tqdm.tqdm`.
          lora_request: None; here for scripts from vLLM, as are the last two.
          priority: one integer for all, or one per prompt; lower numbers start earlier and are
            preempted later. None = all equal. No prompt waits forever, whatever its priority.
          on_error: "raise": a prompt that cannot be served raises before any work is done; one that
            fails while it runs raises when the others are done. "return": its output has an `error`
            with the reason, and the others are answered.
          tokenization_kwargs: None.
          mm_processor_kwargs: None.

        Raises:
          RequestError: with "raise", for the first prompt that cannot be served.
          RuntimeError: the LLM was closed, or its device failed.
        """
        require_absent(
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )
        units = prompt_units(prompts, on_error)
        return self._generate(units, sampling_params, use_tqdm, on_error, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: Priority = None,
        *,
        on_error: str = "raise",
        tokenization_kwargs: None = None,
        **template_args: Unpack[ChatKeywords],
    ) -> list[RequestOutput]:
        """Answers conversations, rendered with the checkpoint's chat template.

        Args:
          messages: one conversation, a list of {"role": ..., "content": ...}, or a list of them.
          sampling_params: as in `generate`.
          use_tqdm: as in `generate`.
          lora_request: as in `generate`.
          priority: as in `generate`.
          on_error: as in `generate`.
          tokenization_kwargs: as in `generate`.
          **template_args: `chat_template` (source or name), `add_generation_prompt` (default True),
            `continue_final_message`, `chat_template_content_format`, `tools`, `documents`,
            `chat_template_kwargs`; and `cache_salt`, which keeps the cached prefixes of one tenant
            apart. Parts of the chat that the template ignores are logged as a warning, once.
        """
        require_absent(lora_request=lora_request, tokenization_kwargs=tokenization_kwargs)
        check_template_args(template_args)
        many = are_conversations(messages)
        units: list[Any] = [
            caught(
                lambda one=one: self.render(one, **template_args),
                on_error,
                place=f"conversation {index}" if many else "",
            )
            for index, one in enumerate(messages if many else [messages])
        ]
        return self._generate(units, sampling_params, use_tqdm, on_error, priority)

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
                raise_failure(request)
                if request.final_only and not request.finished:
                    continue
                output = request.output()
                yield new_since(output, before) if request.wants_delta else output
                before = output

    def as_completed(
        self, prompts: Any, sampling_params: Params = None, *, on_error: str = "raise"
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Answers prompts; yields (index in `prompts`, output) in the order they finish."""
        outcomes = self._prepare_all(prompt_units(prompts, on_error), sampling_params, on_error)
        places = {o: i for i, o in enumerate(outcomes) if isinstance(o, Request)}
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, RequestOutput):
                yield place, outcome
        with self._callers.running(list(places)) as steps:
            for advanced in steps:
                for request in advanced:
                    if request.finished:
                        if on_error == "raise":
                            raise_failure(request, f"prompt {places[request]}: ")
                        yield places[request], request.output()

    def _generate(
        self,
        units: Sequence[Any],
        params: Params,
        use_tqdm: UseTqdm,
        on_error: str,
        priority: Priority = None,
    ) -> list[RequestOutput]:
        outcomes = self._prepare_all(units, params, on_error, priority)
        requests = [outcome for outcome in outcomes if isinstance(outcome, Request)]
        shown = use_tqdm if self.engine.config.progress else False
        with ProgressLine(len(requests), shown) as line, self._callers.running(requests) as steps:
            for advanced in steps:
                line.update(advanced)
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Request) and on_error == "raise":
                raise_failure(outcome, f"prompt {index}: " if len(units) > 1 else "")
        return [o.output() if isinstance(o, Request) else o for o in outcomes]

    def render(
        self,
        messages: Any,
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Any = None,
        documents: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
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
        if mm_processor_kwargs:
            raise RequestError(
                "mm_processor_kwargs is for images and sound, and these models read text only; "
                f"got {shown(mm_processor_kwargs)}. Leave it out."
            )
        text = apply_template(
            self._renderer,
            tokenizer.chat_templates,
            tokenizer.template_variables,
            messages,
            chat_template=self._chat_template if chat_template is None else chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            chat_template_kwargs=chat_template_kwargs,
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
        priority: Priority = None,
    ) -> list[Request | RequestOutput]:
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error must be 'raise' or 'return'; got {on_error=}. Choose one.")
        priority = [priority] * len(units) if type(priority) is int else priority
        each = zip(
            params_for(len(units), params), priorities_for(len(units), priority), strict=True
        )
        return [
            unit
            if isinstance(unit, RequestOutput)
            else caught(
                lambda u=unit, p=p, r=r: self.prepare(u, p, priority=r),
                on_error,
                unit,
                place=f"prompt {index}" if len(units) > 1 else "",
            )
            for index, (unit, (p, r)) in enumerate(zip(units, each, strict=True))
        ]


def raise_failure(request: Request, place: str = "") -> None:
    """Raises the error that ended a request, if any, with the prompt's place before its text."""
    if isinstance(request.error, RequestError) and place:
        raise type(request.error)(f"{place}{request.error}") from request.error
    if request.error is not None:
        raise request.error


def check_template_args(template_args: Mapping[str, Any]) -> None:
    """Raises for a keyword of `chat` that `LLM.render` does not take, with the nearest name."""
    parameters = inspect.signature(LLM.render).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    for name in template_args:
        if name not in known:
            raise unknown_keyword("chat", name, known)
