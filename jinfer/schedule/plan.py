"""The plan of one dispatch: the scheduler's output, and the input of packing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jinfer.axes import PageId, Slot
from jinfer.schedule.prefix_cache import PageKey
from jinfer.schedule.sequence import TokenSequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """One row of the step: consecutive tokens of one sequence."""

    sequence: TokenSequence
    slot: Slot
    start: int  # first position computed; everything before it is in the pool by then
    num_tokens: int  # >= 1
    samples: bool  # the chunk ends at the newest token: sample the next
    num_logits_rows: int  # the scored prompt positions, and the sample position
    num_steps: int = 1  # above 1: decode steps, each computing the token sampled before it

    @property
    def stop(self) -> int:
        """First position after the chunk; also the row's number of visible tokens."""
        return self.start + self.num_tokens

    @property
    def decodes(self) -> bool:
        """Whether the chunk computes one token, samples the next, and scores nothing."""
        return self.num_tokens == 1 and self.num_logits_rows == 1 and self.samples

    def steps(self) -> Iterator["Chunk"]:
        """Splits the chunk into one chunk per step, in order."""
        if self.num_steps == 1:
            yield self
            return
        for i in range(self.num_steps):
            yield replace(self, start=self.start + i, num_steps=1)

    @property
    def scored_positions(self) -> range:
        """Prompt positions to score: the target of position p is the prompt's token p + 1.

        Empty unless the sequence scores its prompt. Never includes the prompt's last position: it
        has no next prompt token, and is the sample position.
        """
        num_scored = self.num_logits_rows - self.samples
        if not num_scored:
            return range(0)
        end = min(self.stop, self.sequence.num_prompt_tokens - 1)
        return range(end - num_scored, end)


@dataclass(frozen=True, slots=True)
class PageWrite:
    """One new page-table entry, written before the step."""

    slot: Slot
    index: int  # in the slot's row: the page holds positions index * Z .. index * Z + Z - 1
    page_id: PageId


@dataclass(frozen=True, slots=True)
class PageSave:
    """An evicted page, copied to host memory before it is overwritten."""

    page_id: PageId
    key: PageKey


@dataclass(frozen=True, slots=True)
class PageRestore:
    """A page filled from host memory before the step."""

    key: PageKey
    page_id: PageId


@dataclass(frozen=True, slots=True)
class PageCopy:
    """A partial page copied before the step, so that a sequence can append to its own copy."""

    source_id: PageId
    page_id: PageId


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything in one dispatch: one step of any kind, or several that only decode.

    `chunks` holds decoding rows first, then prefills, each oldest first.
    """

    chunks: tuple[Chunk, ...]
    admitted: tuple[
        TokenSequence, ...
    ]  # their slots' rows, pages included, are written before the step
    page_writes: tuple[PageWrite, ...]  # of newly taken pages
    preempted: tuple[
        TokenSequence, ...
    ]  # lost slot and pages since the last plan; none has a chunk
    num_tokens: int  # of the first step
    num_logits_rows: int
    # Moves of whole pages before the step, in this order.
    saves: tuple[PageSave, ...] = ()
    restores: tuple[PageRestore, ...] = ()
    forgotten: tuple[PageKey, ...] = ()  # by the host
    copies: tuple[PageCopy, ...] = ()

    @property
    def moves_pages(self) -> bool:
        return bool(self.saves or self.restores or self.forgotten or self.copies)

    @property
    def only_decodes(self) -> bool:
        return all(chunk.decodes for chunk in self.chunks)

    @property
    def num_steps(self) -> int:
        return max(chunk.num_steps for chunk in self.chunks)
