"""All device arrays of an engine, behind calls that take host values only."""

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
    """The device side of an engine. Every call dispatches and returns.

    Calls take numpy arrays, names and plain numbers, never device arrays. So another process can
    make the same calls in the same order, with the same effect.
    """

    def run(self, name: str, batch: StepBatch | DecodeBatch) -> StepOutput | DecodeOutput:
        """Dispatches a step program; returns its output, which may not be ready."""
        ...

    def write_slots(
        self, slot_A: np.ndarray, rows: SamplingState, page_table_AM: np.ndarray
    ) -> None:
        """Admits sequences; see `jinfer.step.slots.write_slots`."""

    def restore_counts(self, slot: int, token_J: np.ndarray) -> None:
        """Counts output tokens of a slot's sequence; see `jinfer.step.slots.restore_counts`."""

    def move_pages(
        self,
        saves: Sequence[PageSave],
        restores: Sequence[PageRestore],
        forgotten: Sequence[PageKey],
        copies: Sequence[PageCopy],
    ) -> None:
        """Carries out the page moves of one plan, in this order."""

    def fail(self, error: Exception) -> None:
        """Tells the processes that make the same calls that a step failed here."""

    def close(self) -> None:
        """Frees everything on the devices, and the pages in host memory. Idempotent."""


class ModelRunner:
    """This process's shard of one model: parameters, pages, slots and programs."""

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
        """Returns the seconds that one dispatch takes to restore pages from host memory; waits."""
        self.pages, elapsed_s = self.mover.time_restore(self.pages)
        return elapsed_s

    def fail(self, error: Exception) -> None:
        pass  # no other process makes these calls

    def close(self) -> None:
        free_arrays(self.params, self.pages, self.slots)
        self.params = self.pages = self.slots = None
        self.programs = {}
        self.mover.close()


def free_arrays(*trees: Any) -> None:
    """Frees the device memory of every array, even if other references remain."""
    for array in jax.tree.leaves(trees):
        if isinstance(array, jax.Array) and not array.is_deleted():
            array.delete()
