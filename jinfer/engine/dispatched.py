"""A dispatch in flight: its plan, its output, and how the host reads it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from jinfer.schedule.plan import Chunk, StepPlan
from jinfer.schedule.sequence import Status
from jinfer.step.batch import DecodeOutput, StepOutput


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A dispatch that the host has not read; the device may have finished it."""

    plan: StepPlan
    output: StepOutput | DecodeOutput  # logprobs None if no request wants them
    num_places: int  # tokens or rows in each step of its program, padding included
    start_s: float  # of `time.monotonic()`, when it was sent

    @property
    def is_done(self) -> bool:
        """Whether reading would not wait."""
        return all(array.is_ready() for array in jax.tree.leaves(self.output))

    def read(self) -> Iterator[tuple[StepOutput, list[tuple[Chunk, range]]]]:
        """Waits, then yields each step's output with its chunks and their rows of logits."""
        output = jax.device_get(self.output)  # the wait
        if isinstance(output, StepOutput):
            yield output, list(self._logits_rows())
            return
        chunks_of_rows = [list(chunk.steps()) for chunk in self.plan.chunks]
        for i in range(max(output.num_sampled_B, default=0)):
            chunks = [
                (chunks_of_rows[row][i], range(row, row + 1))
                for row in range(len(chunks_of_rows))
                if i < output.num_sampled_B[row]
            ]
            logprobs = jax.tree.map(lambda a_IB, i=i: a_IB[i], output.logprobs)
            yield StepOutput(token_R=output.token_IB[i], logprobs=logprobs), chunks
        for chunk, num_sampled in zip(self.plan.chunks, output.num_sampled_B, strict=False):
            assert num_sampled == chunk.num_steps or chunk.sequence.status is Status.FINISHED, (
                f"the device stopped, the host did not: {chunk.sequence.request_id=}, "
                f"{num_sampled=}"
            )

    def _logits_rows(self) -> Iterator[tuple[Chunk, range]]:
        start = 0
        for chunk in self.plan.chunks:
            yield chunk, range(start, start + chunk.num_logits_rows)
            start += chunk.num_logits_rows


class Observer(Protocol):
    """Is told of every step, for example by a benchmark."""

    def dispatched(self, start_s: float, output: Any) -> None:
        """A program was called at `time.monotonic() == start_s`; its output may not be ready."""

    def read(self, chunks: Sequence[Chunk], num_places: int) -> None:
        """One step of a dispatch was read: its chunks, and its places with padding."""
