"""The asyncio API: many callers, and one thread that runs the engine."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack
from uuid import uuid4

from jinfer.arguments.engine_args import EngineArgs, keywords_of
from jinfer.arguments.keywords import ChatKeywords, EngineKeywords, full_signature
from jinfer.arguments.vllm_methods import missing_attribute, require_absent
from jinfer.engine.load_line import LoadLine
from jinfer.engine.metrics import MetricsSnapshot
from jinfer.engine.running import Request
from jinfer.errors import RequestError, shown
from jinfer.llm import LLM, check_template_args
from jinfer.request.output import RequestOutput, new_since
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt, as_prompt
from jinfer.shipped import DEFAULT_MODEL


class AsyncLLM:
    """Answers prompts for concurrent coroutines; the arguments are those of `LLM`.

    One thread runs the engine's steps, and sleeps when there is no work. Leaving an `async for`
    early, or cancelling its task, ends the request.
    """

    __signature__ = full_signature()

    def __init__(
        self, model: str | Path = DEFAULT_MODEL, **engine_args: Unpack[EngineKeywords]
    ) -> None:
        self._llm = LLM(model, **engine_args)
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], object]] = deque()  # for the engine's thread to run
        self._streams: dict[str, _Stream] = {}  # used by the engine's thread only
        self._failure: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="jinfer-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "AsyncLLM":
        """The same as `AsyncLLM(**vars(engine_args))`."""
        return cls(**keywords_of(engine_args))

    if not TYPE_CHECKING:  # type checkers shall still find misspelt attributes

        def __getattr__(self, name: str) -> Any:
            raise missing_attribute("AsyncLLM", name)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Ends every running request, stops the thread and frees the device. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._llm.close()

    def shutdown(self) -> None:
        """The same as `close`, under vLLM's name."""
        self.close()

    def get_tokenizer(self) -> Any:
        """As `LLM.get_tokenizer`."""
        return self._llm.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """As `LLM.get_default_sampling_params`."""
        return self._llm.get_default_sampling_params()

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        *,
        lora_request: None = None,
        **absent: None,
    ) -> AsyncIterator[RequestOutput]:
        """Yields the output so far whenever it grew; the last one is finished.

        A slow caller may miss intermediate outputs, never the last. `SamplingParams.output_kind`
        chooses between the whole output, its new part, and the last output only.

        Args:
          prompt: text, token ids, or a dict as in `LLM.generate`.
          sampling_params: None = the checkpoint's defaults.
          request_id: unique among unfinished requests; None = a random one.
          priority: a waiting request with a lower value starts first.
          lora_request: None; here for scripts from vLLM.
          **absent: further keywords of vLLM's `generate`, None too.

        Raises:
          RequestError: the prompt or a parameter is not supported.
          RuntimeError: the engine is closed or failed.
        """
        require_absent(lora_request=lora_request, **absent)
        unit = as_prompt(prompt)
        async for output in self._answer(lambda: unit, sampling_params, request_id, priority):
            yield output

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        lora_request: None = None,
        **template_args: Unpack[ChatKeywords],
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for one conversation; `template_args` as in `LLM.chat`."""
        require_absent(lora_request=lora_request)
        check_template_args(template_args)

        def render() -> Prompt:
            return self._llm.render(messages, **template_args)

        async for output in self._answer(render, sampling_params, request_id, priority):
            yield output

    def abort(self, request_id: str | Iterable[str]) -> "_Nothing":
        """Ends requests now; their streams yield a last output with finish_reason "abort".

        Returns at once. `await` is allowed, as in vLLM, but not needed.

        Raises:
          RequestError: an id is not a string.
        """
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        for one in ids:
            _check_id(one)
            self._submit(lambda one=one: self._abort(one))
        return _Nothing()

    def reset_prefix_cache(self) -> "_Nothing":
        """As `LLM.reset_prefix_cache`, between two steps; running requests go on.

        Returns at once. `await` is allowed, as in vLLM, but not needed.

        Raises:
          RuntimeError: the engine is closed or failed.
        """
        if not self._submit(self._llm.reset_prefix_cache):
            raise self._why_stopped() from self._failure
        return _Nothing()

    def metrics(self) -> MetricsSnapshot:
        """As `LLM.metrics`; callable from any thread, also during a step."""
        return self._llm.metrics()

    def prometheus(self) -> str:
        """As `LLM.prometheus`: the answer to a Prometheus scrape."""
        return self._llm.prometheus()

    def _why_stopped(self) -> RuntimeError:
        why = f"it failed with {self._failure!r}" if self._failure else "it was closed"
        return RuntimeError(f"the engine must be running; got: {why}. Make a new AsyncLLM.")

    async def _answer(
        self,
        make_prompt: Callable[[], Prompt],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        request_id = f"request-{uuid4().hex}" if request_id is None else request_id
        _check_id(request_id)
        # Rendering and tokenizing take milliseconds, too long for the event loop.
        request = await asyncio.to_thread(
            lambda: self._llm.prepare(make_prompt(), params, request_id, priority)
        )
        request.streams = not request.final_only
        stream = _Stream(asyncio.get_running_loop())
        if not self._submit(lambda: self._add(request, stream)):
            raise self._why_stopped() from self._failure
        finished, before = False, None
        try:
            while not finished:
                output = await stream.next()
                finished = output.finished
                if output.error is not None:
                    raise output.error
                yield new_since(output, before) if request.wants_delta else output
                before = output
        finally:
            if not finished:
                self._submit(lambda: self._leave(request_id, stream))

    def _submit(self, command: Callable[[], object]) -> bool:
        """Gives a command to the engine's thread; False if the thread has ended."""
        with self._wake:
            if self._closing:
                return False
            self._commands.append(command)
            self._wake.notify()
            return True

    def _run(self) -> None:
        engine = self._llm.engine
        load_line = LoadLine(engine)
        try:
            while self._take_commands():
                for request in engine.step():
                    self._tell(request)
                load_line.stepped()
        except BaseException as error:  # raised for every caller, here and after `_submit`
            self._failure = error
        with self._wake:
            self._closing = True
            commands, self._commands = self._commands, deque()
        for command in commands:  # left in the queue; their streams must end too
            with suppress(Exception):  # a failed engine raises; the other streams must still end
                command()
        for stream in self._streams.values():
            stream.fail(self._why_stopped())

    def _take_commands(self) -> bool:
        """Waits for work and runs submitted commands; False when closing."""
        with self._wake:
            while not (self._commands or self._llm.engine.has_work or self._closing):
                self._wake.wait()
        while self._commands:  # one by one: if one fails, `_run` still handles the rest
            self._commands.popleft()()
        return not self._closing

    def _add(self, request: Request, stream: "_Stream") -> None:
        try:
            self._llm.engine.add(request)
        except Exception as error:  # a duplicate id, or a failed engine: only this caller gets it
            stream.fail(error)
        else:
            self._streams[request.request_id] = stream

    def _abort(self, request_id: str) -> None:
        request = self._llm.engine.abort(request_id)
        if request is not None:
            self._tell(request)

    def _leave(self, request_id: str, stream: "_Stream") -> None:
        if self._streams.get(request_id) is stream:  # not a later request with the same id
            self._abort(request_id)

    def _tell(self, request: Request) -> None:
        stream = self._streams[request.request_id]
        if request.final_only and not request.finished:
            return
        if request.finished:
            del self._streams[request.request_id]
        stream.put(request.output())


def _check_id(request_id: Any) -> None:
    if not isinstance(request_id, str):
        raise RequestError(f"request_id must be a string; got {shown(request_id)}. Pass a str.")


class _Nothing:
    """An awaitable that is already done."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


class _Stream:
    """Passes a request's newest output from the engine's thread to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changed = asyncio.Event()
        self._newest: RequestOutput | BaseException | None = None

    def put(self, output: RequestOutput) -> None:
        self._set(output)

    def fail(self, error: BaseException) -> None:
        self._set(error)

    async def next(self) -> RequestOutput:
        await self._changed.wait()
        self._changed.clear()
        newest = self._newest
        if isinstance(newest, BaseException):
            raise newest
        assert newest is not None
        return newest

    def _set(self, newest: RequestOutput | BaseException) -> None:
        def change() -> None:
            self._newest = newest
            self._changed.set()

        with suppress(RuntimeError):  # the loop is closed: no caller waits
            self._loop.call_soon_threadsafe(change)
