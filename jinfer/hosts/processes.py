"""The processes of one run: one leads, the others follow, and none outlives another's death."""

import itertools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinfer.hosts.channel import Connection, pack

# From the news that a process is gone until this one is ended by force: long enough for `finally`
# blocks, short enough that a device held in a collective is soon free.
GRACE_S = 10.0
# A death breaks collectives everywhere. Whoever fails waits so long for the news of a death, so
# that the cause is told and not what followed from it.
CAUSE_S = 1.0
IDLE_S = 1.0  # without a call, after which a follower looks whether its last ones failed
FLUSH_S = 2.0

_CALL, _GOODBYE, _FAILED = "call", "goodbye", "failed"


class Ending:
    """Why this process has to end, once it has to; ends it by force if it does not by itself."""

    def __init__(
        self, *, grace_s: float = GRACE_S, end: Callable[[int], object] = os._exit
    ) -> None:
        self._grace_s, self._end = grace_s, end
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._announced, self._leaving, self._flushed = (threading.Event() for _ in range(3))
        self.why: str | None = None
        # Made now: from Python 3.12 on no thread can be started while the interpreter shuts down.
        for target in (self._end_by_force, self._flush):
            threading.Thread(target=target, name="jinfer-ending", daemon=True).start()

    def announce(self, why: str) -> bool:
        """Says why in one line, and starts the time that is left; False if all was settled before.

        The time runs on a thread of its own: the main one may hang in a collective for ever.
        """
        if not self.note(why):
            return False
        print(f"jinfer: {why} This process ends too.", file=sys.stderr, flush=True)
        self._announced.set()
        return True

    def note(self, why: str) -> bool:
        """Keeps the reason of an end that shows itself, such as an exception on its way up."""
        with self._lock:
            if self._settled.is_set():
                return False
            self.why = why
            self._settled.set()
        return True

    def release(self) -> None:
        """The run is over: from here on every process may end, and none has to say why."""
        with self._lock:
            self._settled.set()
        if self.why is None:  # the threads have nothing to wait for
            self._announced.set()
            self._leaving.set()

    def settled(self, within_s: float = 0.0) -> bool:
        """Whether there is a reason to end or the run is over; waits for that if it may come."""
        return self._settled.wait(within_s)

    def require_none(self) -> None:
        """Raises RuntimeError if this process has to end."""
        if self.why is not None:
            raise RuntimeError(
                f"every process must be running; got: {self.why} Start all of them again."
            )

    def leave(self) -> None:
        """At exit: ends at once where JAX would wait for processes that never come."""
        if self.why is not None:
            # On a thread, since a pipe that nobody reads would hold this one.
            self._leaving.set()
            self._flushed.wait(FLUSH_S)
            self._end(1)

    def _end_by_force(self) -> None:
        self._announced.wait()
        if self.why is not None:
            time.sleep(self._grace_s)
            self.leave()

    def _flush(self) -> None:
        self._leaving.wait()
        sys.stdout.flush()
        sys.stderr.flush()
        self._flushed.set()


class Leader:
    """Process 0: what it sends, every follower receives, in the order of sending."""

    def __init__(self, followers: Mapping[int, Connection], ending: Ending) -> None:
        """Watches the followers from here on.

        Args:
          followers: process id -> connection.
          ending: of this process.
        """
        self.ending = ending
        self.turn = threading.RLock()  # to send a call and make it here, before the next one
        self.numbers = itertools.count()
        self._followers = dict(followers)
        for process_id in self._followers:
            threading.Thread(
                target=self._watch, args=(process_id,), name=f"jinfer-{process_id}", daemon=True
            ).start()

    @property
    def num_processes(self) -> int:
        return 1 + len(self._followers)

    def send(self, call: Any) -> None:
        """Sends a call to all; waits for no answer.

        Raises:
          RuntimeError: a process is gone or failed, this one included.
        """
        self.ending.require_none()
        self._send_all((_CALL, call))
        self.ending.require_none()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What is raised in the block ends the followers, which may wait for what never comes."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Tells the followers that this process failed, unless they know why."""
        if not self.ending.settled(CAUSE_S):
            why = f"process 0 of {self.num_processes} failed: {_told(error)}"
            if self.ending.note(why):
                self._send_all((_FAILED, why))

    def leave(self) -> None:
        """At exit: lets the followers go, or tells them what this process dies of."""
        error = getattr(sys, "last_value", None)  # that Python printed, if it ends by one
        if error is not None:
            self.fail(error)
        elif not self.ending.settled():
            self.ending.release()
            self._send_all((_GOODBYE, None))
        self.ending.leave()

    def _send_all(self, message: Any) -> None:
        packed = pack(message)
        for process_id, connection in self._followers.items():
            try:
                connection.send(packed)
            except OSError:
                self._announce(_gone(process_id, self.num_processes))

    def _watch(self, process_id: int) -> None:
        try:
            kind, text = self._followers[process_id].receive()
        except (EOFError, OSError):
            self._announce(_gone(process_id, self.num_processes))
            return
        except Exception as error:  # whatever unpickling what another version sent may raise
            self._announce(_not_understood(process_id, self.num_processes, error))
            return
        if kind == _FAILED:
            self._announce(f"process {process_id} of {self.num_processes} failed: {text}")

    def _announce(self, why: str) -> None:
        if self.ending.announce(why):
            self._send_all((_FAILED, why))


class Follower:
    """Any other process: receives what the leader sends."""

    def __init__(
        self, leader: Connection, ending: Ending, *, process_id: int, num_processes: int
    ) -> None:
        """Receives from here on, on a thread of its own."""
        self.ending = ending
        self.process_id, self.num_processes = process_id, num_processes
        self._leader = leader
        self._received: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="jinfer-0", daemon=True).start()

    def calls(self) -> Iterator[Any]:
        """What the leader sends, until it says goodbye; None where nothing came for a second.

        Raises:
          SystemExit: another process is gone or failed.
        """
        while True:
            try:
                kind, call = self._received.get(timeout=IDLE_S)
            except queue.Empty:
                yield None
                continue
            if kind == _GOODBYE:
                return
            if kind == _FAILED:
                raise SystemExit(1)
            yield call

    def fail(self, error: BaseException) -> None:
        """Tells the leader what this process dies of, unless it dies of another's death."""
        if not self.ending.settled(CAUSE_S):
            self._tell(_told(error))

    def leave(self) -> None:
        """At exit: tells the leader if it still counts on this process."""
        error = getattr(sys, "last_value", None)
        if error is not None:
            self.fail(error)
        elif not self.ending.settled():
            self._tell("it came to its end before process 0.")
        self.ending.leave()

    def _tell(self, text: str) -> None:
        if self.ending.note(f"process {self.process_id} of {self.num_processes} failed: {text}"):
            try:
                self._leader.send(pack((_FAILED, text)))
            except OSError:
                pass  # it is gone, and whoever watches it says so

    def _receive(self) -> None:
        kind = _CALL
        while kind == _CALL:
            try:
                kind, content = self._leader.receive()
            except (EOFError, OSError):
                kind, content = _FAILED, _gone(0, self.num_processes)
            except Exception as error:  # whatever unpickling what another version sent may raise
                kind, content = _FAILED, _not_understood(0, self.num_processes, error)
            if kind == _FAILED:
                self.ending.announce(content)
            if kind == _GOODBYE:
                self.ending.release()
            self._received.put((kind, content))


def _gone(process_id: int, num_processes: int) -> str:
    return (
        f"process {process_id} of {num_processes} is gone: its connection ended without a goodbye, "
        "as when it is killed or its host fails."
    )


def _not_understood(process_id: int, num_processes: int, error: Exception) -> str:
    return (
        f"process {process_id} of {num_processes} was not understood ({_told(error)[:-1]}). "
        "Install the same version of jinfer everywhere."
    )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".: ") + "."
