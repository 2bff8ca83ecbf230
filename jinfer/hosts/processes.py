"""The processes of one run: one leader, and followers; if one process dies, all end."""

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

# Time from the news of a dead process to the forced end of this one: long enough for `finally`
# blocks, short enough that a device stuck in a collective is soon free.
GRACE_S = 10.0
# A death breaks collectives in all processes. A process that fails waits this long for the news of
# a death, so that it reports the cause and not a consequence.
CAUSE_S = 1.0
IDLE_S = 1.0  # after this long without a call, a follower checks if its last ones failed
FLUSH_S = 2.0

_CALL, _GOODBYE, _FAILED = "call", "goodbye", "failed"


class Ending:
    """The reason why this process must end; ends it by force if it does not end by itself."""

    def __init__(
        self, *, grace_s: float = GRACE_S, end: Callable[[int], object] = os._exit
    ) -> None:
        self._grace_s, self._end = grace_s, end
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._announced, self._leaving, self._flushed = (threading.Event() for _ in range(3))
        self.why: str | None = None
        # Started now: since Python 3.12 no thread can start while the interpreter shuts down.
        for target in (self._end_by_force, self._flush):
            threading.Thread(target=target, name="jinfer-ending", daemon=True).start()

    def announce(self, why: str) -> bool:
        """Prints the reason and starts the grace period; returns False if already settled.

        A separate thread waits for the period to end: the main one may hang in a collective.
        """
        if not self.note(why):
            return False
        print(f"jinfer: {why} This process ends too.", file=sys.stderr, flush=True)
        self._announced.set()
        return True

    def note(self, why: str) -> bool:
        """Records a reason that needs no printing, such as an exception that is propagating."""
        with self._lock:
            if self._settled.is_set():
                return False
            self.why = why
            self._settled.set()
        return True

    def release(self) -> None:
        """Marks the run as over: from now on, processes may end without a reason."""
        with self._lock:
            self._settled.set()
        if self.why is None:  # lets the threads end
            self._announced.set()
            self._leaving.set()

    def settled(self, within_s: float = 0.0) -> bool:
        """Whether there is a reason to end or the run is over; waits up to `within_s` for it."""
        return self._settled.wait(within_s)

    def require_none(self) -> None:
        """Raises RuntimeError if this process must end."""
        if self.why is not None:
            raise RuntimeError(
                f"every process must be running; got: {self.why} Start all of them again."
            )

    def leave(self) -> None:
        """At exit: ends at once if there is a reason; JAX would wait for dead processes."""
        if self.why is not None:
            # Flushes on another thread, since a pipe that nobody reads would block this one.
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
    """Process 0: every follower receives its calls, in the order of sending."""

    def __init__(self, followers: Mapping[int, Connection], ending: Ending) -> None:
        """Starts to watch the followers.

        Args:
          followers: process id -> connection.
          ending: of this process.
        """
        self.ending = ending
        self.turn = threading.RLock()  # held to send a call and make it here, before the next call
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
        """Sends a call to all followers; does not wait for answers.

        Raises:
          RuntimeError: a process is gone or failed, this one included.
        """
        self.ending.require_none()
        self._send_all((_CALL, call))
        self.ending.require_none()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """An exception in the block also ends the followers, which might else wait for ever."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Tells the followers that this process failed, unless a reason is already known."""
        if not self.ending.settled(CAUSE_S):
            why = f"process 0 of {self.num_processes} failed: {_told(error)}"
            if self.ending.note(why):
                self._send_all((_FAILED, why))

    def leave(self) -> None:
        """At exit: releases the followers, or sends them the error that ends this process."""
        error = getattr(sys, "last_value", None)  # the uncaught exception, if any
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
        except Exception as error:  # unpickling another version's message may raise anything
            self._announce(_not_understood(process_id, self.num_processes, error))
            return
        if kind == _FAILED:
            self._announce(f"process {process_id} of {self.num_processes} failed: {text}")

    def _announce(self, why: str) -> None:
        if self.ending.announce(why):
            self._send_all((_FAILED, why))


class Follower:
    """Any process except 0: receives the leader's calls."""

    def __init__(
        self, leader: Connection, ending: Ending, *, process_id: int, num_processes: int
    ) -> None:
        """Starts a thread that receives messages."""
        self.ending = ending
        self.process_id, self.num_processes = process_id, num_processes
        self._leader = leader
        self._received: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="jinfer-0", daemon=True).start()

    def calls(self) -> Iterator[Any]:
        """Yields the leader's calls until its goodbye, and None after each second without a call.

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
        """Sends the leader the error that ends this process, unless another's death caused it."""
        if not self.ending.settled(CAUSE_S):
            self._tell(_told(error))

    def leave(self) -> None:
        """At exit: tells the leader, if it still needs this process."""
        error = getattr(sys, "last_value", None)
        if error is not None:
            self.fail(error)
        elif not self.ending.settled():
            self._tell("it ended before process 0.")
        self.ending.leave()

    def _tell(self, text: str) -> None:
        if self.ending.note(f"process {self.process_id} of {self.num_processes} failed: {text}"):
            try:
                self._leader.send(pack((_FAILED, text)))
            except OSError:
                pass  # it is gone; the receiving thread reports that

    def _receive(self) -> None:
        kind = _CALL
        while kind == _CALL:
            try:
                kind, content = self._leader.receive()
            except (EOFError, OSError):
                kind, content = _FAILED, _gone(0, self.num_processes)
            except Exception as error:  # unpickling another version's message may raise anything
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
        f"process {process_id} of {num_processes} sent a bad message ({_told(error)[:-1]}). "
        "Install the same version of jinfer everywhere."
    )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".: ") + "."
