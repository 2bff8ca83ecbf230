"""Several callers of one engine in one thread: generators that share its steps."""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jinfer.engine.engine import Engine
from jinfer.engine.interrupt import deferred
from jinfer.engine.load_line import LoadLine
from jinfer.engine.replicas import Replicas
from jinfer.engine.running import Request


class Callers:
    """Steps an engine for its iterating callers; aborts the requests of callers who stop early.

    Python's garbage collector may end an abandoned generator at any point, even in the middle of
    a step, when the scheduler must not change. So `Callers` only notes an abandoned request, and
    aborts it once nothing is changing the engine.
    """

    def __init__(self, engine: Engine | Replicas) -> None:
        self._engine = engine
        self._load_line = LoadLine(engine)
        self._is_changing = False  # whether the engine is changing now
        self._left: deque[str] = deque()  # ids of abandoned requests

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Lets the block change the engine; then aborts the requests abandoned meanwhile."""
        self._is_changing = True
        try:
            yield
        finally:
            self._is_changing = False
            self._abort_left()

    @contextmanager
    def running(self, requests: Sequence[Request]) -> Iterator[Iterator[list[Request]]]:
        """Queues the requests and yields their steps; after the block aborts the unfinished."""
        try:
            with deferred(), self.changing():
                for request in requests:
                    self._engine.add(request)
            yield self._steps(requests)
        finally:
            self._left.extend(request.request_id for request in requests)
            with deferred():
                self._abort_left()

    def _abort_left(self) -> None:
        """Aborts the abandoned requests, unless the engine is changing: then later."""
        while self._left and not self._is_changing:
            self._is_changing = True
            try:
                self._engine.abort(self._left.popleft())
            finally:
                self._is_changing = False

    def _steps(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Steps the engine until all are finished; yields the requests that each step advanced.

        Callers may alternate, as over two streams: a step then advances the requests of both. A
        request that finished in another caller's step is yielded once all before it are finished.
        """
        left = OrderedDict.fromkeys(requests)
        # A caller who prints a text as it comes wants no line in the middle of it.
        tells_load = not all(request.streams for request in requests)
        while left:
            oldest = next(iter(left))
            if oldest.finished:
                advanced = [oldest]
            else:
                with deferred(), self.changing():
                    advanced = self._engine.step()
                if tells_load:
                    self._load_line.stepped()
            mine = [request for request in advanced if request in left]
            for request in mine:
                if request.finished:
                    del left[request]
            if mine:
                yield mine
