"""Builds a StepPlan."""

from dataclasses import dataclass, field

from jinfer.axes import Slot
from jinfer.schedule.plan import Chunk, PageCopy, PageRestore, PageWrite, StepPlan
from jinfer.schedule.sequence import TokenSequence


@dataclass(slots=True)
class PlanBuilder:
    """The chunks planned so far, and the rest of the step's budgets."""

    num_tokens_left: int
    num_logits_rows_left: int
    chunks: dict[TokenSequence, Chunk] = field(default_factory=dict)
    admitted: list[TokenSequence] = field(default_factory=list)
    page_writes: list[PageWrite] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    restores: list[PageRestore] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.chunks[chunk.sequence] = chunk
        self.num_tokens_left -= chunk.num_tokens
        self.num_logits_rows_left -= chunk.num_logits_rows

    def drop(self, sequence: TokenSequence) -> None:
        """Removes a sequence about to lose its slot. Its part of the budgets stays spent."""
        if self.chunks.pop(sequence, None) is not None:
            self.page_writes = [w for w in self.page_writes if w.slot != sequence.slot]

    def keep_pages(self, slot: Slot, num_pages: int) -> None:
        """Drops the slot's page writes from index `num_pages` on."""
        self.page_writes = [w for w in self.page_writes if w.slot != slot or w.index < num_pages]

    def seal(self, **moves: tuple) -> StepPlan:
        """Returns the plan; `moves` are the fields that the builder does not know."""
        chunks = tuple(self.chunks.values())
        return StepPlan(
            chunks=chunks,
            admitted=tuple(self.admitted),
            page_writes=tuple(self.page_writes),
            copies=tuple(self.copies),
            restores=tuple(self.restores),
            num_tokens=sum(chunk.num_tokens for chunk in chunks),
            num_logits_rows=sum(chunk.num_logits_rows for chunk in chunks),
            **moves,
        )
