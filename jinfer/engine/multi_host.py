"""One engine over several processes: process 0 plans and reads, the others mirror it.

Every process holds its shard of one model. Process 0 sends each call on its runner to the others,
which make the same call on theirs. So all processes dispatch the same programs in the same order,
as collectives require, and no decision depends on the clock or memory of several processes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

import jax
import numpy as np

from jinfer.config import EngineConfig
from jinfer.hosts.distributed import processes
from jinfer.hosts.processes import Follower, Leader
from jinfer.runner.model_runner import ModelRunner, Runner
from jinfer.sampling.sampler import SamplingState
from jinfer.schedule.plan import PageCopy, PageRestore, PageSave
from jinfer.schedule.prefix_cache import PageKey
from jinfer.startup.load import Loaded, load
from jinfer.step.batch import DecodeBatch, DecodeOutput, StepBatch, StepOutput

# Dispatches that a follower leaves unread. It notices a failed one only by waiting for it.
_MAX_UNREAD = 4


def load_everywhere(
    config: EngineConfig, devices: Sequence[jax.Device] | None = None
) -> tuple[Loaded, Runner]:
    """Loads the model in every process of the run; in the followers it does not return.

    Args:
      config: the user's settings.
      devices: the devices of this replica, only with a single process; None = the first ones.

    Returns:
      The model as loaded in this process, and the runner for all processes.

    Raises:
      SystemExit: in a follower, when process 0 has ended.
      Also the errors of `jinfer.startup.load.load`.
    """
    these = processes()
    if these is None:
        loaded = load(config, devices)
        return loaded, loaded.runner
    assert devices is None, "a replica with devices of its own, among several processes"
    if isinstance(these, Follower):
        follow(these, config)
    number = next(these.numbers)
    with these.turn, these.failing():
        these.send((number, "load", (config,)))
        loaded = load(config)
    return loaded, LeadingRunner(loaded.runner, these, number)


def follow(follower: Follower, own: EngineConfig | None = None) -> NoReturn:
    """Mirrors process 0 until it ends: loads the same models and makes the same calls.

    Args:
      follower: this process.
      own: the engine that this process was asked for; None = any that process 0 loads.

    Raises:
      SystemExit: at the end: status 0 after process 0 said goodbye, else 1.
      ValueError: process 0 was asked for another engine.
    """
    runners: dict[int, Any] = {}
    unread: deque[Any] = deque()
    try:
        for call in follower.calls():
            if call is None:  # the leader asks whether a dispatch failed here
                jax.block_until_ready(unread)
                unread.clear()
                continue
            number, method, args = call
            if method == "load":
                if number == 0 and own is not None:
                    _require_same(own, *args)
                runners[number] = _load_shard(*args)
                continue
            output = getattr(runners[number], method)(*args)
            if method == "close":
                del runners[number]
            if method == "run":
                unread.append(output)
            if len(unread) > _MAX_UNREAD:
                jax.block_until_ready(unread.popleft())
    except BaseException as error:
        follower.fail(error)
        raise
    raise SystemExit(0)


class LeadingRunner:
    """A `Runner` whose followers make the same calls, each on its own `ModelRunner`."""

    def __init__(self, runner: ModelRunner, leader: Leader, number: int) -> None:
        self._runner, self._leader, self._number = runner, leader, number

    def run(self, name: str, batch: StepBatch | DecodeBatch) -> StepOutput | DecodeOutput:
        return self._call("run", name, batch)

    def write_slots(
        self, slot_A: np.ndarray, rows: SamplingState, page_table_AM: np.ndarray
    ) -> None:
        self._call("write_slots", slot_A, rows, page_table_AM)

    def restore_counts(self, slot: int, token_J: np.ndarray) -> None:
        self._call("restore_counts", slot, token_J)

    def move_pages(
        self,
        saves: Sequence[PageSave],
        restores: Sequence[PageRestore],
        forgotten: Sequence[PageKey],
        copies: Sequence[PageCopy],
    ) -> None:
        self._call("move_pages", saves, restores, forgotten, copies)

    def fail(self, error: Exception) -> None:
        """Ends the followers, which may wait forever in a collective."""
        self._leader.fail(error)

    def close(self) -> None:
        """Frees the memory of this process, even if another process is gone."""
        try:
            with self._leader.turn:
                if self._leader.ending.why is None:
                    self._leader.send((self._number, "close", ()))
        finally:
            self._runner.close()

    def _call(self, method: str, *args: Any) -> Any:
        # Two engines may run on two threads; every process must see one order of calls.
        with self._leader.turn, self._leader.failing():
            self._leader.send((self._number, method, args))
            return getattr(self._runner, method)(*args)


def _load_shard(config: EngineConfig) -> ModelRunner:
    return load(replace(config, skip_tokenizer_init=True, progress=False)).runner


def _require_same(own: EngineConfig, leading: EngineConfig) -> None:
    # Hub tokens may differ, since process 0's is used; and a message must not show one.
    names = [f.name for f in fields(own) if f.name != "hf_token"]
    differing = [name for name in names if getattr(own, name) != getattr(leading, name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"every process must ask for the same engine; got {name}={getattr(own, name)!r} here "
            f"and {name}={getattr(leading, name)!r} in process 0. Run the same script everywhere."
        )
