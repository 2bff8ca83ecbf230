"""Process 0 and one follower as two threads, with runners that only note what they are asked."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from loopback import socket_pair

from jinfer.config import EngineConfig
from jinfer.engine import multi_host
from jinfer.engine.multi_host import LeadingRunner, follow, load_everywhere
from jinfer.hosts import processes
from jinfer.hosts.channel import Connection
from jinfer.hosts.processes import Ending, Follower, Leader
from jinfer.schedule.plan import PageSave
from jinfer.step.pack import BucketShape
from jinfer.step.slots import admission_rows

CONFIG = EngineConfig(model="somewhere")


@dataclass
class Notes:
    """A runner that notes each call, and fails where it is told to."""

    config: EngineConfig
    calls: list[tuple[str, Any]] = field(default_factory=list)
    fails_at: str = ""

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any) -> str:
            self.calls.append((method, args))
            if method == self.fails_at:
                raise RuntimeError("the device is lost")
            return f"output of {method}"

        return call


class Pair:
    """The leader here, the follower on a thread; each loads `Notes`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.loaded: dict[bool, list[Notes]] = {True: [], False: []}  # by whether it leads
        self.fails_at = {True: "", False: ""}
        self.raised: BaseException | None = None
        one, other = map(Connection, socket_pair())
        self.connections = one, other
        endings = [Ending(end=lambda status: None) for _ in range(2)]
        self.leader = Leader({1: one}, endings[0])
        self.follower = Follower(other, endings[1], process_id=1, num_processes=2)
        monkeypatch.setattr(multi_host, "load", self._load)
        monkeypatch.setattr(multi_host, "processes", lambda: self.leader)
        monkeypatch.setattr(processes, "CAUSE_S", 0.1)

    def _load(self, config: EngineConfig) -> Any:
        leads = threading.current_thread() is threading.main_thread()
        notes = Notes(config, fails_at=self.fails_at[leads])
        self.loaded[leads].append(notes)
        return SimpleNamespace(runner=notes)

    def start(self, own: EngineConfig | None = None) -> None:
        def target() -> None:
            try:
                follow(self.follower, own)
            except BaseException as error:
                self.raised = error

        self.thread = threading.Thread(target=target)
        self.thread.start()

    def finish(self) -> BaseException | None:
        """Lets the follower go; returns what it raised."""
        self.leader.leave()
        self.thread.join(timeout=5)
        assert not self.thread.is_alive()
        return self.raised


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    pair = Pair(monkeypatch)
    yield pair
    for side in (pair.leader, pair.follower):
        side.ending.release()
    for connection in pair.connections:
        connection.close()


def test_the_follower_makes_the_same_calls_with_the_same_values(pair: Pair) -> None:
    pair.start(CONFIG)
    _, runner = load_everywhere(CONFIG)
    batch = BucketShape(num_tokens=3, num_rows=2, num_page_writes=4, null_slot=2)
    assert runner.run("step of 3 tokens", batch.empty()) == "output of run"
    runner.write_slots(np.arange(8), admission_rows([], 100), np.ones((8, 2), np.int32))
    runner.restore_counts(3, np.arange(5, dtype=np.int32))
    runner.move_pages((PageSave(page_id=4, key=b"k"),), (), (b"old",), ())  # pyright: ignore
    runner.close()
    raised = pair.finish()
    assert isinstance(raised, SystemExit) and raised.code == 0
    [here], [there] = pair.loaded[True], pair.loaded[False]
    methods = ["run", "write_slots", "restore_counts", "move_pages", "close"]
    assert [method for method, _ in here.calls] == methods
    np.testing.assert_equal(values_of(there.calls), values_of(here.calls))
    assert there.config == replace(CONFIG, skip_tokenizer_init=True, progress=False)


def values_of(value: Any) -> Any:
    """Dataclasses of arrays as dicts, so that numpy compares them."""
    if isinstance(value, list | tuple):
        return [values_of(one) for one in value]
    fields = getattr(value, "__dataclass_fields__", None)
    return value if fields is None else {name: values_of(getattr(value, name)) for name in fields}


def test_engines_after_and_beside_each_other_are_told_apart(pair: Pair) -> None:
    pair.start(CONFIG)
    runners = [load_everywhere(replace(CONFIG, seed=seed))[1] for seed in (0, 1)]
    runners[1].restore_counts(1, np.zeros(1))
    runners[0].close()
    runners[1].close()
    pair.finish()
    called = [[method for method, _ in notes.calls] for notes in pair.loaded[False]]
    assert called == [["close"], ["restore_counts", "close"]]


def test_an_access_token_is_neither_compared_nor_shown() -> None:
    own, leading = replace(CONFIG, hf_token="mine"), replace(CONFIG, hf_token="theirs")
    multi_host._require_same(own, leading)
    with pytest.raises(ValueError, match="the same engine; got seed=1 here") as caught:
        multi_host._require_same(replace(own, seed=1), leading)
    assert "mine" not in str(caught.value) and "theirs" not in str(caught.value)


def test_another_engine_is_refused(pair: Pair) -> None:
    pair.start(replace(CONFIG, max_num_seqs=4))
    _, runner = load_everywhere(CONFIG)
    pair.thread.join(timeout=5)
    with pytest.raises(ValueError, match="the same engine; got max_num_seqs=4 here and .*=None in"):
        raise pair.raised or AssertionError("it was taken")
    with pytest.raises(RuntimeError, match="process 1 of 2 failed: ValueError: every process must"):
        while True:
            runner.restore_counts(0, np.zeros(1))
    runner.close()  # frees what is here
    assert pair.loaded[True][0].calls[-1] == ("close", ())


def test_a_call_that_fails_in_the_follower_ends_the_leader(pair: Pair) -> None:
    pair.fails_at[False] = "run"
    pair.start()
    _, runner = load_everywhere(CONFIG)
    runner.run("step of 1 tokens", None)  # pyright: ignore
    assert pair.leader.ending.settled(5)
    assert pair.leader.ending.why == ("process 1 of 2 failed: RuntimeError: the device is lost.")
    pair.thread.join(timeout=5)
    assert isinstance(pair.raised, RuntimeError)


def test_a_call_that_fails_in_the_leader_ends_the_follower(pair: Pair) -> None:
    pair.fails_at[True] = "run"
    pair.start()
    _, runner = load_everywhere(CONFIG)
    with pytest.raises(RuntimeError, match="the device is lost"):
        runner.run("step of 1 tokens", None)  # pyright: ignore
    pair.thread.join(timeout=5)
    assert isinstance(pair.raised, SystemExit) and pair.raised.code == 1
    assert pair.follower.ending.why == "process 0 of 2 failed: RuntimeError: the device is lost."


def test_a_step_that_fails_after_it_was_sent_ends_the_follower(pair: Pair) -> None:
    pair.start()
    _, runner = load_everywhere(CONFIG)
    runner.run("step of 1 tokens", None)  # pyright: ignore
    runner.fail(RuntimeError("the device is lost"))  # as found when it was read
    pair.thread.join(timeout=5)
    assert isinstance(pair.raised, SystemExit) and pair.raised.code == 1
    assert pair.follower.ending.why == "process 0 of 2 failed: RuntimeError: the device is lost."


def test_a_model_that_cannot_be_loaded_ends_the_follower(pair: Pair) -> None:
    def refuse(config: EngineConfig) -> Any:
        raise ValueError("no room")

    pair.monkeypatch.setattr(multi_host, "load", refuse)
    with pytest.raises(ValueError, match="no room"):
        load_everywhere(CONFIG)
    assert pair.follower.ending.settled(5)
    assert pair.follower.ending.why == "process 0 of 2 failed: ValueError: no room."
    with pytest.raises(RuntimeError, match="every process must be running; got: process 0 of 2"):
        load_everywhere(CONFIG)


def test_alone_nothing_is_sent(pair: Pair) -> None:
    pair.monkeypatch.setattr(multi_host, "processes", lambda: None)
    pair.monkeypatch.setattr(
        multi_host, "load", lambda config, devices: SimpleNamespace(runner=devices)
    )
    _, runner = load_everywhere(CONFIG, [])
    assert not isinstance(runner, LeadingRunner)
