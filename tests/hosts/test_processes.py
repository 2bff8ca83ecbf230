import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from loopback import socket_pair

from jinfer.hosts import processes
from jinfer.hosts.channel import Connection
from jinfer.hosts.processes import Ending, Follower, Leader

SOON_S = 5.0


class Run:
    """A leader and two followers in one process; what would end a process is noted instead."""

    def __init__(self) -> None:
        self.ended: dict[int, list[int]] = {0: [], 1: [], 2: []}
        pairs = {process_id: socket_pair() for process_id in (1, 2)}
        self.connections = {i: tuple(map(Connection, pair)) for i, pair in pairs.items()}
        mine = {i: one for i, (one, _) in self.connections.items()}
        self.leader = Leader(mine, self.ending(0))
        self.followers = {
            i: Follower(other, self.ending(i), process_id=i, num_processes=3)
            for i, (_, other) in self.connections.items()
        }

    def ending(self, process_id: int) -> Ending:
        return Ending(grace_s=0.05, end=self.ended[process_id].append)

    def kill(self, process_id: int) -> None:
        """As the system does with the connections of a process that is killed."""
        for number, (one, other) in self.connections.items():
            if process_id == 0:
                one.close()
            elif process_id == number:
                other.close()

    def why(self, process_id: int) -> str | None:
        who: Any = self.followers.get(process_id, self.leader)
        return who.ending.why


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(processes, "CAUSE_S", 0.2)
    monkeypatch.delattr(sys, "last_value", raising=False)
    run = Run()
    yield run
    run.leader.ending.release()
    for follower in run.followers.values():
        follower.ending.release()
    for pair in run.connections.values():
        for connection in pair:
            connection.close()


def wait_for(condition: Any) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_followers_receive_every_call_in_order_until_the_leader_leaves(run: Run) -> None:
    for number in range(5):
        run.leader.send(("run", number))
    run.leader.leave()
    for follower in run.followers.values():
        calls = [call for call in follower.calls() if call is not None]
        assert calls == [("run", number) for number in range(5)]
        follower.leave()
        run.kill(follower.process_id)  # it is gone, and nobody minds
    time.sleep(0.1)
    assert run.ended == {0: [], 1: [], 2: []}


def test_a_follower_that_is_killed_ends_all(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.kill(1)
    wait_for(lambda: run.ended[0] == run.ended[2] == [1])
    assert capfd.readouterr().err.count("jinfer: process 1 of 3 is gone: its connection") == 2
    with pytest.raises(SystemExit) as ended:
        list(run.followers[2].calls())
    assert ended.value.code == 1
    with pytest.raises(RuntimeError, match="process 1 of 3 is gone.*Start all of them again"):
        run.leader.send("more")


def test_no_thread_is_started_for_an_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    run.kill(1)
    wait_for(lambda: run.ended[0] == run.ended[2] == [1])
    run.leader.leave()  # as at exit
    assert run.ended[0] == [1, 1]


def test_a_leader_that_is_killed_ends_all(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.leader.ending.release()  # it does nothing any more
    run.kill(0)
    wait_for(lambda: run.ended[1] == run.ended[2] == [1])
    assert capfd.readouterr().err.count("jinfer: process 0 of 3 is gone") == 2


def test_what_a_follower_raises_is_told_everywhere(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run.followers[2].fail(ValueError("no such folder"))
    wait_for(lambda: run.ended[0] == run.ended[1] == [1])
    sentence = "jinfer: process 2 of 3 failed: ValueError: no such folder. This process ends too."
    assert capfd.readouterr().err.splitlines() == [sentence] * 2
    run.followers[2].leave()
    assert run.ended[2] == [1]


def test_what_the_leader_raises_is_told_to_the_followers(run: Run) -> None:
    with pytest.raises(KeyError), run.leader.failing():
        raise KeyError("x")
    wait_for(lambda: run.ended[1] == run.ended[2] == [1])
    assert run.why(1) == run.why(2) == "process 0 of 3 failed: KeyError: 'x'."
    assert run.ended[0] == []  # the exception is on its way to the user
    run.leader.leave()
    assert run.ended[0] == [1]


def test_what_ended_a_script_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "last_value", OSError("disk full"), raising=False)
    run.leader.leave()
    wait_for(lambda: run.ended[1] == run.ended[2] == [1])
    assert run.why(1) == "process 0 of 3 failed: OSError: disk full."


def test_a_script_that_ends_early_is_told(run: Run) -> None:
    run.followers[1].leave()
    wait_for(lambda: run.ended[0] == run.ended[2] == [1])
    assert run.why(2) == "process 1 of 3 failed: it ended before process 0."


def test_a_death_is_told_before_what_follows_from_it(run: Run) -> None:
    run.kill(1)
    run.followers[2].fail(RuntimeError("the collective broke"))
    run.leader.fail(RuntimeError("the collective broke"))
    assert run.why(0) == run.why(2)
    assert str(run.why(0)).startswith("process 1 of 3 is gone")
