"""The engine: plans, dispatches and reads, once per `step`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from jax import Device

from jinfer.compile.names import decode_name, step_name
from jinfer.compile.programs import CompileGuard
from jinfer.config import EngineConfig
from jinfer.engine.dispatched import Dispatched, Observer
from jinfer.engine.metrics import EngineMetrics, Load, MetricsSnapshot
from jinfer.engine.multi_host import load_everywhere
from jinfer.engine.pacing import Pacing
from jinfer.engine.running import Completion, Request
from jinfer.errors import NaNLogitsError, RequestError
from jinfer.request.params import SamplingParams, check_priority
from jinfer.request.prompt import Prompt, check_prompt_ids
from jinfer.request.seeds import Seeds
from jinfer.request.stop import Finish
from jinfer.request.tokenizer import encode_prompt
from jinfer.runner.model_runner import free_arrays
from jinfer.sampling.admission import check_row, sampling_row
from jinfer.schedule.capacity import bucket_for
from jinfer.schedule.make import make_scheduler
from jinfer.schedule.plan import Chunk
from jinfer.schedule.prefix_cache import root_key
from jinfer.schedule.sequence import Status, TokenSequence
from jinfer.step.batch import StepOutput
from jinfer.step.pack import BucketShape, DecodeShape, pack, pack_decode
from jinfer.step.slots import ADMISSION_ROWS, RESTORED_TOKENS, admission_rows

# Decode steps per dispatch while some request has stop strings: tokens after one are wasted.
STEPS_WITH_STOP_STRINGS = 4


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread at a time calls it.

    The loop stays one dispatch ahead: `step` dispatches n+1, then reads n, so that host and
    device work at the same time. `_pending` is the unread dispatch. If every row decodes, a
    dispatch may be several steps long.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        devices: Sequence[Device] | None = None,
        metrics: EngineMetrics | None = None,
    ) -> None:
        """Loads and compiles everything; raises the errors of `multi_host.load_everywhere`.

        Args:
          config: the user's settings.
          devices: the devices to run on; None = the first ones.
          metrics: the counters to use, perhaps shared by replicas; None = its own.
        """
        loaded, self.runner = load_everywhere(config, devices)
        self.config = config
        self.model, self.plan = loaded.model, loaded.plan
        self.tokenizer, self.defaults = loaded.tokenizer, loaded.defaults
        self.start_report = loaded.report
        self._shapes = {size: BucketShape.of(size, self.plan) for size in self.plan.token_buckets}
        self._decode_shapes = {n: DecodeShape.of(n, self.plan) for n in self.plan.decode_buckets}
        self._pacing = Pacing(config, self.plan)
        try:
            self._pacing.time_programs(self.runner, self._shapes, self._decode_shapes)
        except BaseException:  # the caller gets no engine to close
            self.runner.close()
            raise
        self._guard = CompileGuard(config.late_compile)
        self.scheduler = make_scheduler(
            self.plan,
            self._pacing.pace,
            prefix_caching=config.enable_prefix_caching,
            min_restored_pages=loaded.min_restored_pages,
        )
        self._pending: Dispatched | None = None
        self._requests: dict[str, Request] = {}
        self._completions: dict[TokenSequence, Completion] = {}
        self._num_streams = 0  # requests whose caller reads each token as it comes
        self._num_with_stop_strings = 0
        self._seeds = Seeds(config.seed)
        self._metrics = metrics or EngineMetrics()
        self.observer: Observer | None = None
        self._why_stopped: str | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._pending is not None

    @property
    def num_late_compiles(self) -> int:
        """Compilations since warm-up; anything but 0 is a bug."""
        return self._guard.num_late

    @property
    def load(self) -> Load:
        """Returns the current load."""
        num_pages = self.plan.num_pages - 1  # without the null page
        return Load(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_pages_used=num_pages - self.scheduler.num_free_pages,
            num_pages=num_pages,
            num_preemptions=self.scheduler.num_preemptions,
        )

    def metrics(self) -> MetricsSnapshot:
        """Returns the current load and the counts since the start; any thread may call it."""
        return self._metrics.snapshot(self.load)

    def require_alive(self) -> None:
        """Raises RuntimeError if the engine is closed or broken."""
        if self._why_stopped is not None:
            raise RuntimeError(
                f"the engine must be running; got: {self._why_stopped}. Make a new LLM."
            )

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> Request:
        """Checks a request completely and returns it ready for `add`; queues nothing.

        A waiting request of lower `priority` starts first and is preempted last.

        Raises:
          RequestError: the prompt or a parameter cannot be honoured.
          RuntimeError: the engine is closed or broken.
        """
        self.require_alive()
        arrival_time = time.monotonic()  # tokenizing and the wait to be queued count too
        check_priority(priority)
        params.check_against(
            vocab_size=self.model.vocab_size,
            max_logprobs=self.plan.max_logprobs,
            max_model_len=self.plan.max_model_len,
            has_tokenizer=self.tokenizer is not None,
        )
        prompt_ids = prompt.token_ids
        if prompt_ids is None:
            prompt_ids = encode_prompt(prompt, self.tokenizer)
        check_prompt_ids(
            prompt_ids,
            vocab_size=self.model.vocab_size,
            max_model_len=self.plan.max_model_len,
            has_text=prompt.text is not None,
        )
        request = Request(
            request_id=request_id,
            prompt=prompt.text,
            prompt_ids=prompt_ids,
            params=params,
            eos_token_ids=self.defaults.eos_token_ids,
            vocab_size=self.model.vocab_size,
            max_model_len=self.plan.max_model_len,
            tokenizer=self.tokenizer,
            priority=priority,
            root_key=root_key(
                str(self.config.model), self.plan.dtype, self.plan.kv_dtype, prompt.cache_salt
            ),
        )
        request.metrics.arrival_time = arrival_time
        self._check_row(request.completions[0])
        num_room = self.plan.max_model_len - len(prompt_ids)
        if params.min_tokens > num_room:
            raise RequestError(
                "min_tokens must fit behind the prompt; got "
                f"min_tokens={params.min_tokens} with room for {num_room} after "
                f"{len(prompt_ids)} tokens of prompt. Lower it, or raise max_model_len."
            )
        return request

    def add(self, request: Request) -> None:
        """Queues a prepared request behind all others of its priority.

        Raises:
          RequestError: its id is in use.
          RuntimeError: the engine is closed or broken.
        """
        self.require_alive()
        if request.request_id in self._requests:
            raise RequestError(
                f"a request id must be unique; got request_id={request.request_id!r} twice."
            )
        if request.seed is None:
            request.seed = self._seeds.draw()
        self._requests[request.request_id] = request
        self._num_streams += request.streams
        self._num_with_stop_strings += bool(request.params.stop)
        for completion in request.completions:
            self._completions[completion.sequence] = completion
            completion.sequence.arrival_s = request.metrics.arrival_time
            self.scheduler.add(completion.sequence)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request now and returns it with its output so far; None if it is not here."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for completion in request.unfinished:
            self._release(completion)
        self._retire(request)
        request.abort()
        return request

    def step(self) -> list[Request]:
        """Dispatches the next step, then reads the one before.

        Returns:
          The requests that got a token, finished or failed; each once.

        Raises:
          RuntimeError: the engine is closed, or the device failed and all running requests with it.
        """
        return self.read(self.dispatch())

    def dispatch(self) -> Dispatched | None:
        """First half of `step`: sends the next step and returns the one before, for `read`."""
        self.require_alive()
        self._pacing.step_begins(self._pending)
        with self._one_step():
            dispatched = self._dispatch()
            pending, self._pending = self._pending, dispatched
            return pending

    def read(self, pending: Dispatched | None) -> list[Request]:
        """Second half of `step`: waits for a dispatch, reads it and returns as `step` does."""
        with self._one_step():
            advanced = self._read(pending) if pending is not None else []
        self._pacing.step_ends()
        return advanced

    @contextmanager
    def _one_step(self) -> Iterator[None]:
        with self._guard.watch():
            try:
                yield
            except BaseException as error:  # half a step: its plan and its buffers are lost
                self._why_stopped = f"a step failed with {type(error).__name__}: {error}"
                if isinstance(error, Exception):  # after an interrupt a notebook may load again
                    self.runner.fail(error)
                raise

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix; running requests continue."""
        self.require_alive()
        self.scheduler.forget_prefixes()

    def close(self) -> None:
        """Frees everything on the device. Idempotent; the engine cannot be used afterwards."""
        if self._why_stopped == _CLOSED:
            return
        try:
            for request_id in list(self._requests):
                self.abort(request_id)
        finally:  # frees the memory even if an abort raises
            output = None if self._pending is None else self._pending.output
            self._pending = None
            free_arrays(output)
            self.runner.close()
            self._guard.close()
            self._why_stopped = _CLOSED

    def _dispatch(self) -> Dispatched | None:
        # Host: which sequences run, and on which pages.
        plan = self.scheduler.plan(self._max_steps(), self._pacing.next_start_s(self._pending))
        if plan is None:
            return None
        if plan.moves_pages:
            self.runner.move_pages(plan.saves, plan.restores, plan.forgotten, plan.copies)
        self._admit(plan.admitted)
        if self._decode_shapes and plan.only_decodes:
            size = bucket_for(self.plan.decode_buckets, len(plan.chunks))
            shape = self._decode_shapes[size]
            batch = pack_decode(plan, shape, wants_logprobs=self._wants_logprobs)
            name = decode_name(size)
        else:
            size = bucket_for(self.plan.token_buckets, plan.num_tokens)
            batch = pack(plan, self._shapes[size], wants_logprobs=self._wants_logprobs)
            name = step_name(size)
        start_s = time.monotonic()
        output = self.runner.run(name, batch)
        if self.observer is not None:
            self.observer.dispatched(start_s, output)
        if not any(map(self._wants_logprobs, plan.chunks)):
            output = replace(output, logprobs=None)  # saves their transfer to the host
        return Dispatched(plan, output, num_places=size, start_s=start_s)

    def _max_steps(self) -> int:
        """Most steps of the next dispatch: fewer if the host must look at the tokens early."""
        if self._num_streams:
            return 1
        limit = self.plan.max_decode_steps
        return min(limit, STEPS_WITH_STOP_STRINGS) if self._num_with_stop_strings else limit

    def _admit(self, admitted: Sequence[TokenSequence]) -> None:
        now = time.monotonic()
        for start in range(0, len(admitted), ADMISSION_ROWS):
            group = admitted[start : start + ADMISSION_ROWS]
            rows = [self._slot_row(sequence) for sequence in group]
            slot_A = np.full(ADMISSION_ROWS, self.plan.max_slots, np.int32)
            slot_A[: len(group)] = [sequence.slot for sequence in group]  # pyright: ignore
            page_table_AM = np.zeros((ADMISSION_ROWS, self.plan.pages_per_slot), np.int32)
            for row, sequence in enumerate(group):
                page_table_AM[row, : len(sequence.pages)] = sequence.pages
            self.runner.write_slots(
                slot_A, admission_rows(rows, self.plan.vocab_size), page_table_AM
            )
        for sequence in admitted:
            metrics = self._completions[sequence].request.metrics
            if metrics.first_scheduled_time is None:  # not again after a preemption
                metrics.first_scheduled_time = now
                self._metrics.admitted(
                    queue_s=now - metrics.arrival_time,
                    num_prompt_tokens=sequence.num_prompt_tokens,
                    num_cached_tokens=sequence.num_cached,
                )
            self._restore_counts(sequence)

    def _slot_row(self, sequence: TokenSequence):
        request = self._completions[sequence].request
        assert request.seed is not None, f"queued without a seed: {request.request_id=}"
        return sampling_row(
            request.params,
            sequence,
            seed=request.seed,
            stop_ids=request.stop_ids,
            bad_words=self._completions[sequence].bad_words.spellings,
            vocab_size=self.plan.vocab_size,
        )

    def _restore_counts(self, sequence: TokenSequence) -> None:
        """Counts the output tokens of a preempted sequence again, as it resumes."""
        assert sequence.slot is not None, f"admitted without a slot: {sequence.request_id=}"
        for start in range(0, len(sequence.output_ids), RESTORED_TOKENS):
            tokens = sequence.output_ids[start : start + RESTORED_TOKENS]
            token_J = np.full(RESTORED_TOKENS, self.plan.vocab_size, np.int32)
            token_J[: len(tokens)] = tokens
            self.runner.restore_counts(sequence.slot, token_J)

    def _wants_logprobs(self, chunk: Chunk) -> bool:
        params = self._completions[chunk.sequence].request.params
        return params.logprobs is not None or bool(chunk.scored_positions)

    def _read(self, dispatched: Dispatched) -> list[Request]:
        advanced: dict[str, Request] = {}
        was_done = dispatched.is_done
        for output, chunks in dispatched.read():
            now = time.monotonic()
            self._pacing.was_read(dispatched, now, was_done=was_done)
            if self.observer is not None:
                self.observer.read([chunk for chunk, _ in chunks], dispatched.num_places)
            for chunk, logits_rows in chunks:
                self._read_chunk(chunk, logits_rows, output, now, advanced)
        return list(advanced.values())

    def _read_chunk(
        self,
        chunk: Chunk,
        logits_rows: range,
        output: StepOutput,
        now: float,
        advanced: dict[str, Request],
    ) -> None:
        token_id = int(output.token_R[logits_rows[-1]]) if chunk.samples else None
        completion = self._completions.get(chunk.sequence)
        self.scheduler.commit(chunk, token_id)
        if completion is None or chunk.sequence.status is Status.FINISHED:
            return  # it ended while this was in flight
        self._publish(completion, chunk, logits_rows, output, now)
        request = completion.request
        if (chunk.samples and completion.sequence is chunk.sequence) or request.finished:
            advanced[request.request_id] = request

    def _publish(
        self,
        completion: Completion,
        chunk: Chunk,
        logits_rows: range,
        output: StepOutput,
        now: float,
    ) -> None:
        request = completion.request
        try:
            if not completion.append(chunk, logits_rows, output, now):
                self._restart(completion)
                return
        except Exception as error:  # an error in one request ends only that request
            request.fail(error)
            for other in request.completions:
                self._release(other)
            self._retire(request)
            if isinstance(error, NaNLogitsError):  # perhaps of one moment: keep none for others
                self.scheduler.forget_prefixes()
            return
        if chunk.samples:
            self._count_token(completion, now)
        if completion.finish is not None:
            self._release(completion)
        if request.finished:
            self._retire(request)

    def _restart(self, completion: Completion) -> None:
        """Queues a completion again, to sample another token in place of one taken back."""
        self._check_row(completion)
        self._release(completion)
        completion.sequence = completion.sequence.restarted()
        self._completions[completion.sequence] = completion
        self.scheduler.add(completion.sequence)

    def _check_row(self, completion: Completion) -> None:
        request, words = completion.request, completion.bad_words.spellings
        check_row(request.params, request.stop_ids, words, self.model.vocab_size)

    def _count_token(self, completion: Completion, now: float) -> None:
        metrics, before = completion.request.metrics, completion.last_token_time
        completion.last_token_time = now
        self._metrics.sampled_token(
            ttft_s=metrics.ttft_s if metrics.num_output_tokens == 1 else None,
            gap_s=None if before is None else now - before,
        )

    def _release(self, completion: Completion) -> None:
        self.scheduler.abort(completion.sequence)
        self._completions.pop(completion.sequence, None)

    def _retire(self, request: Request) -> None:
        request.metrics.finished_time = now = time.monotonic()
        if self._requests.pop(request.request_id, None) is not None:
            # A completion still without a reason is aborted next.
            reason = "error" if request.error else request.completions[0].finish or Finish.ABORT
            self._metrics.finished(
                str(reason), e2e_s=now - request.metrics.arrival_time, tpot_s=request.metrics.tpot_s
            )
            self._num_streams -= request.streams
            self._num_with_stop_strings -= bool(request.params.stop)


_CLOSED = "it was closed"
