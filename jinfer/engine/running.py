"""A request while it runs, on the host: from sampled tokens to its output."""

from collections.abc import Sequence
from dataclasses import replace

from jinfer.errors import NaNLogitsError, without_frames
from jinfer.request.bad_words import BadWords
from jinfer.request.detokenizer import Detokenizer
from jinfer.request.output import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jinfer.request.params import ALL_TOKENS, RequestOutputKind, SamplingParams
from jinfer.request.stop import Finish, StopChecker
from jinfer.request.tokenizer import Tokenizer
from jinfer.sampling.sampler import NAN_TOKEN
from jinfer.schedule.plan import Chunk
from jinfer.schedule.sequence import TokenSequence
from jinfer.step.batch import StepOutput

PositionLogprobs = dict[int, Logprob]


class Request:
    """One request and its n completions. Made by `Engine.prepare`, after every check."""

    def __init__(
        self,
        *,
        request_id: str,
        prompt: str | None,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        max_model_len: int,
        tokenizer: Tokenizer | None,
        priority: int = 0,
        root_key: bytes = b"",
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_ids = list(prompt_ids)  # one list, shared by all outputs: each token makes one
        self.params = params
        self.tokenizer = tokenizer
        self.priority = priority
        self.seed = params.seed  # None until the engine draws one
        self.stop_reasons = stop_reasons(params, eos_token_ids, tokenizer, vocab_size)
        self.stop_ids = tuple(self.stop_reasons)
        self.streams = False  # the caller reads each token as it comes
        self.metrics = RequestMetrics(num_prompt_tokens=len(prompt_ids))
        self.error: Exception | None = None
        # The first prompt token has no token before it, so it has no logprob.
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        max_length = max_model_len
        if params.max_tokens is not None:
            max_length = min(max_model_len, len(prompt_ids) + params.max_tokens)
        bad_words = BadWords(params.bad_words, tokenizer, vocab_size)
        self.completions = [
            Completion(
                self,
                TokenSequence(
                    request_id=request_id,
                    index=index,
                    prompt_ids=prompt_ids,
                    max_length=max_length,
                    # The completions share the prompt, so one of them scores it for all.
                    scores_prompt=params.prompt_logprobs is not None and index == 0,
                    root_key=root_key,
                    priority=priority,
                ),
                bad_words.copy(),
            )
            for index in range(params.n)
        ]

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the first completion found in the prefix cache."""
        return self.completions[0].sequence.num_cached

    @property
    def finished(self) -> bool:
        return self.error is not None or not self.unfinished

    @property
    def unfinished(self) -> list["Completion"]:
        return [c for c in self.completions if c.finish is None]

    def abort(self) -> None:
        """Ends the request now; its output so far remains."""
        try:
            for completion in self.unfinished:
                completion.abort()
        except Exception as error:  # in its last piece of text; the request ends anyway
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends the request with an error; its output so far remains readable."""
        self.error = without_frames(error)
        for completion in self.unfinished:
            completion.finish = Finish.ERROR

    @property
    def final_only(self) -> bool:
        """Whether the caller wants only the last output."""
        return self.params.output_kind is RequestOutputKind.FINAL_ONLY

    @property
    def wants_delta(self) -> bool:
        """Whether each output has only the part that is new since the one before."""
        return self.params.output_kind is RequestOutputKind.DELTA

    def output(self) -> RequestOutput:
        """A snapshot of everything so far."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            outputs=[completion.output() for completion in self.completions],
            finished=self.finished,
            metrics=replace(self.metrics, num_cached_tokens=self.num_cached_tokens),
            num_cached_tokens=self.num_cached_tokens,
            error=self.error,
        )


class Completion:
    """One of a request's n outputs: its sequence, its text so far, and why it ended."""

    def __init__(self, request: Request, sequence: TokenSequence, bad_words: BadWords) -> None:
        params = request.params
        self.request = request
        self.sequence = sequence
        self.bad_words = bad_words
        self.finish: Finish | None = None
        self.stop_reason: int | str | None = None
        self.last_token_time: float | None = None  # of `time.monotonic()`, when it was read
        self.text = ""
        self._stopped_by_text = False
        self.cumulative_logprob: float | None = None
        self.logprobs: list[PositionLogprobs] | None = None
        if params.logprobs is not None:
            self.cumulative_logprob, self.logprobs = 0.0, []
        self._detokenizer: Detokenizer | None = None
        if request.tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(
                request.tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                prompt_ids=request.prompt_ids,
            )
        self._stops = StopChecker(
            params.stop, include_stop_str_in_output=params.include_stop_str_in_output
        )

    def append(self, chunk: Chunk, logits_rows: range, output: StepOutput, now: float) -> bool:
        """Adds a step's results for this sequence; the scheduler has committed the token already.

        Returns False if the token completed a bad word. It is no longer part of the sequence then,
        and banned at this place: restart the sequence.

        Args:
          chunk: the tokens of this sequence that the step computed.
          logits_rows: the chunk's rows of `output`: scored prompt positions, then the sample.
          output: the step's output, on the host.
          now: `time.monotonic()` when it was read.

        Raises:
          NaNLogitsError: the logits of the token are NaN.
          RequestError: the bad words leave no token.
        """
        num_scores = len(logits_rows) - chunk.samples
        if num_scores:
            self._append_scores(logits_rows[:num_scores], output)
        if not chunk.samples:
            return True
        if not self._stays():
            return False
        metrics = self.request.metrics
        metrics.num_output_tokens += 1
        if metrics.first_token_time is None:
            metrics.first_token_time = now
        token_id = self.sequence.output_ids[-1]
        if self.logprobs is not None and self.cumulative_logprob is not None:
            entry = self._logprobs(logits_rows[-1], token_id, self.request.params.logprobs, output)
            self.logprobs.append(entry)
            self.cumulative_logprob += entry[token_id].logprob
        self._append_token(token_id)
        return True

    def _stays(self) -> bool:
        """Whether the newest token may stay; else takes it back, and bans it here."""
        token_ids = self.sequence.output_ids
        if token_ids[-1] == NAN_TOKEN:
            token_ids.pop()
            raise NaNLogitsError(
                "a model must yield numbers to sample a token; got none, the logits are NaN, after "
                f"{self.sequence.num_tokens} tokens. Check the weights for NaN and damage; if they "
                "are sound, use dtype='float32', which overflows last."
            )
        spelling = self.bad_words.completed(token_ids)
        if spelling:
            token_ids.pop()
            self.bad_words.ban(spelling, len(token_ids))
        return not spelling

    def abort(self) -> None:
        """Ends here; the output so far remains."""
        self._end(Finish.ABORT, None)

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.sequence.index,
            text=self.text,
            token_ids=list(self.sequence.output_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish,
            stop_reason=self.stop_reason,
        )

    def _append_token(self, token_id: int) -> None:
        """Adds the token's text, then ends for the first reason: stop token, stop string, length.

        As in vLLM: `stop_reason` is what the user named, a stop token or string, never an end
        token. The text includes it only with `include_stop_str_in_output`.
        """
        request, sequence = self.request, self.sequence
        params = request.params
        stops = token_id in request.stop_ids
        stop_string = None
        if self._detokenizer is not None and (not stops or params.include_stop_str_in_output):
            may_stop = not stops and len(sequence.output_ids) >= params.min_tokens
            stop_string = self._show(self._detokenizer.feed([token_id]), may_stop=may_stop)
        if stops:
            reason = request.stop_reasons[token_id]
            self._end(Finish.STOP, reason)
            if isinstance(reason, str) and params.include_stop_str_in_output:
                self.text += reason  # the text of its token is hidden
        elif stop_string is not None:
            self._end(Finish.STOP, stop_string)
        elif sequence.num_tokens >= sequence.max_length:
            self._end(Finish.LENGTH, None)

    def _show(self, piece: str, *, may_stop: bool) -> str | None:
        """Adds the visible part of a piece to the text; returns the stop string it completes."""
        if self._stopped_by_text:
            return None
        checked = self._stops.feed(piece, may_stop=may_stop)
        self.text += checked.text
        self._stopped_by_text = checked.stop is not None
        return checked.stop

    def _end(self, finish: Finish, stop_reason: int | str | None) -> None:
        self.finish, self.stop_reason = finish, stop_reason
        if self._detokenizer is not None and not self._stopped_by_text:
            self._show(self._detokenizer.flush(), may_stop=False)
            self.text += self._stops.flush()

    def _append_scores(self, logits_rows: range, output: StepOutput) -> None:
        scores = self.request.prompt_logprobs
        assert scores is not None, f"scored unasked: {self.request.request_id=}"
        num_top = self.request.params.prompt_logprobs
        for logits_row in logits_rows:
            token_id = int(output.token_R[logits_row])
            scores.append(self._logprobs(logits_row, token_id, num_top, output))

    def _logprobs(
        self, logits_row: int, token_id: int, num_top: int | None, output: StepOutput
    ) -> PositionLogprobs:
        """The logprobs of the chosen token, then of the `num_top` most likely, best first."""
        read = output.logprobs
        chosen_rank = int(read.rank_R[logits_row])
        entries = [(token_id, float(read.token_logprob_R[logits_row]), chosen_rank)]
        num_top = read.top_ids_RJ.shape[-1] if num_top == ALL_TOKENS else num_top or 0
        for place in range(num_top):
            top_id = int(read.top_ids_RJ[logits_row, place])
            entries.append((top_id, float(read.top_logprobs_RJ[logits_row, place]), place + 1))
        tokenizer = self.request.tokenizer
        found: PositionLogprobs = {}
        for entry_id, logprob, rank in entries:
            text = None if tokenizer is None else tokenizer.token_text(entry_id)
            found.setdefault(entry_id, Logprob(logprob=logprob, rank=rank, decoded_token=text))
        return found


def stop_reasons(
    params: SamplingParams,
    eos_token_ids: Sequence[int],
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> dict[int, int | str | None]:
    """Returns the tokens that end the output, each with its `stop_reason`.

    End tokens of the checkpoint's configs and of the tokenizer have None, stop tokens of the user
    their own id. A stop string that is exactly one special token matches no text if special tokens
    are hidden, so its token stops instead.
    """
    reasons: dict[int, int | str | None] = {}
    if tokenizer is not None and params.skip_special_tokens:
        for text in params.stop:
            token_id = tokenizer.token_id(text)
            if token_id in tokenizer.special_ids and token_id < vocab_size:
                reasons[token_id] = text
    reasons |= {token_id: token_id for token_id in params.stop_token_ids}
    if not params.ignore_eos:
        reasons |= dict.fromkeys(eos_token_ids)
        own_id = None if tokenizer is None else tokenizer.eos_token_id
        if own_id is not None and own_id < vocab_size:
            reasons[own_id] = None
    return reasons
