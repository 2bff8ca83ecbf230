"""Everything an engine holds on its devices, behind calls that take values of the host only."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jinfer.compile.names import RESTORE_COUNTS, WRITE_SLOTS
from jinfer.models.decoder import Params
from jinfer.runner.page_mover import PageMover
from jinfer.sampling.sampler import SamplingState
from jinfer.schedule.plan import PageCopy, PageRestore, PageSave
from jinfer.schedule.prefix_cache import PageKey
from jinfer.step.batch import DecodeBatch, DecodeOutput, StepBatch, StepOutput
from jinfer.step.kv_cache import KVPages
from jinfer.step.slots import SlotState


class Runner(Protocol):
    """What an engine asks of whoever holds its model. Every call dispatches and returns.

    What a call takes is numpy arrays, names and plain numbers, never a value of the device: so the
    same calls, made in the same order by another process, do the same there.
    """

    def run(self, name: str, batch: StepBatch | DecodeBatch) -> StepOutput | DecodeOutput:
        """Dispatches one of the programs that step; returns its output, which may not be ready."""
        ...

    def write_slots(
        self, slot_A: np.ndarray, rows: SamplingState, page_table_AM: np.ndarray
    ) -> None:
        """Admits sequences; see `jinfer.step.slots.write_slots`."""

    def restore_counts(self, slot: int, token_J: np.ndarray) -> None:
        """Counts outputs of a slot's sequence; see `jinfer.step.slots.restore_counts`."""

    def move_pages(
        self,
        saves: Sequence[PageSave],
        restores: Sequence[PageRestore],
        forgotten: Sequence[PageKey],
        copies: Sequence[PageCopy],
    ) -> None:
        """Carries out the page moves of one plan, in this order."""

    def fail(self, error: Exception) -> None:
        """Tells whoever makes the same calls elsewhere that what they computed failed here."""

    def close(self) -> None:
        """Frees everything on the devices, and the pages in host memory. Idempotent."""


class ModelRunner:
    """Parameters, pages, slots and programs of one model, as far as this process holds them."""

    def __init__(
        self,
        *,
        params: Params,
        pages: KVPages,
        slots: SlotState,
        programs: dict[str, jax.stages.Compiled],
        mover: PageMover,
    ) -> None:
        """Takes ownership of every array: `pages` and `slots` are consumed by the first step."""
        self.params, self.pages, self.slots = params, pages, slots
        self.programs = programs
        self.mover = mover

    def run(self, name: str, batch: StepBatch | DecodeBatch) -> StepOutput | DecodeOutput:
        self.pages, self.slots, output = self.programs[name](
            self.params, self.pages, self.slots, batch
        )
        return output

    def write_slots(
        self, slot_A: np.ndarray, rows: SamplingState, page_table_AM: np.ndarray
    ) -> None:
        self.slots = self.programs[WRITE_SLOTS](self.slots, slot_A, rows, page_table_AM)

    def restore_counts(self, slot: int, token_J: np.ndarray) -> None:
        self.slots = self.programs[RESTORE_COUNTS](self.slots, np.int32(slot), token_J)

    def move_pages(
        self,
        saves: Sequence[PageSave],
        restores: Sequence[PageRestore],
        forgotten: Sequence[PageKey],
        copies: Sequence[PageCopy],
    ) -> None:
        self.pages = self.mover.apply(self.pages, saves, restores, forgotten, copies)

    def time_restore(self) -> float:
        """Seconds that one dispatch takes to bring pages back from the host; waits for it."""
        self.pages, elapsed_s = self.mover.time_restore(self.pages)
        return elapsed_s

    def fail(self, error: Exception) -> None:
        pass  # nobody else makes these calls

    def close(self) -> None:
        free_arrays(self.params, self.pages, self.slots)
        self.params = self.pages = self.slots = None
        self.programs = {}
        self.mover.close()


def free_arrays(*trees: Any) -> None:
    """Frees the device memory of every array, whoever else may still refer to it."""
    for array in jax.tree.leaves(trees):
        if isinstance(array, jax.Array) and not array.is_deleted():
            array.delete()
