"""What one step computes: the scheduler's answer, and all that packing a batch needs."""

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
    samples: bool  # the chunk ends at the newest token, so the next one is drawn from it
    num_logits_rows: int  # places that want logits: the scored prompt positions, and the draw
    num_steps: int = 1  # more: that many decode steps, each computing the token drawn before

    @property
    def stop(self) -> int:
        """First position after the chunk; also the row's number of visible tokens."""
        return self.start + self.num_tokens

    @property
    def decodes(self) -> bool:
        """One token, from which the next is drawn, and nothing else to read."""
        return self.num_tokens == 1 and self.num_logits_rows == 1 and self.samples

    def steps(self) -> Iterator["Chunk"]:
        """The chunk of each of its steps, in order."""
        if self.num_steps == 1:
            yield self
            return
        for i in range(self.num_steps):
            yield replace(self, start=self.start + i, num_steps=1)

    @property
    def scored_positions(self) -> range:
        """Prompt positions to score: the target of position p is the prompt's token p + 1.

        Empty unless the sequence scores its prompt. The prompt's last position is never among
        them: it has no next prompt token, and serves the draw.
        """
        num_scored = self.num_logits_rows - self.samples
        if not num_scored:
            return range(0)
        end = min(self.stop, self.sequence.num_prompt_tokens - 1)
        return range(end - num_scored, end)


@dataclass(frozen=True, slots=True)
class PageWrite:
    """One new entry of the page table, to be written before the step."""

    slot: Slot
    index: int  # in the slot's row: the page holds positions index * Z .. index * Z + Z - 1
    page_id: PageId


@dataclass(frozen=True, slots=True)
class PageSave:
    """A page that the device gives up, to be copied to host memory before it is overwritten."""

    page_id: PageId
    key: PageKey


@dataclass(frozen=True, slots=True)
class PageRestore:
    """A page to be filled from host memory before the step."""

    key: PageKey
    page_id: PageId


@dataclass(frozen=True, slots=True)
class PageCopy:
    """A partial page to be copied before the step, for a sequence that writes on in its own."""

    source_id: PageId
    page_id: PageId


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything that happens in one dispatch: one step, or one or more that only decode.

    `chunks` holds decoding rows first, then prefills, each oldest first.
    """

    chunks: tuple[Chunk, ...]
    admitted: tuple[
        TokenSequence, ...
    ]  # their slot's row, pages included, is written before the step
    page_writes: tuple[PageWrite, ...]  # of pages newly taken
    preempted: tuple[
        TokenSequence, ...
    ]  # lost slot and pages since the plan before; none has a chunk
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
