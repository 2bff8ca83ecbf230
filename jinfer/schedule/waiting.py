"""The queue of waiting sequences, in which none waits for ever."""

import heapq
from collections.abc import Iterator

from jinfer.schedule.sequence import TokenSequence


class WaitingQueue:
    """Sequences in order of rank: by priority, then by arrival.

    A later sequence may start first: because of its priority, because more of its prefix is
    cached, or because the earlier one is late in any case. To bound this, the oldest waiting
    sequence counts the later ones that start before it, and becomes due after `max_overtaken`. A
    due sequence ranks before all others, here and while it runs. So a sequence with k older ones
    is overtaken at most `max_overtaken` * (k + 1) times, and the oldest due sequence is never
    preempted.
    """

    def __init__(self, max_overtaken: int) -> None:
        self._max_overtaken = max_overtaken
        # Heaps of (rank or order, serial, sequence). An entry is valid if its serial is the
        # sequence's latest; stale entries are skipped when they reach the top.
        self._by_rank: list[tuple[tuple[float, bool, int], int, TokenSequence]] = []
        self._by_order: list[tuple[int, int, TokenSequence]] = []
        self._serial_of: dict[TokenSequence, int] = {}
        self._num_entries = 0

    def __len__(self) -> int:
        return len(self._serial_of)

    def __iter__(self) -> Iterator[TokenSequence]:
        return iter(self._serial_of)

    def add(self, sequence: TokenSequence) -> None:
        serial = self._num_entries
        self._num_entries += 1
        self._serial_of[sequence] = serial
        heapq.heappush(self._by_rank, (sequence.rank, serial, sequence))
        heapq.heappush(self._by_order, (sequence.order, serial, sequence))

    def discard(self, sequence: TokenSequence) -> None:
        """Removes a sequence that will not start."""
        del self._serial_of[sequence]

    def first(self, count: int) -> list[TokenSequence]:
        """The first sequences, at most `count`, without removing them."""
        entries = []
        while self._by_rank and len(entries) < count:
            entry = heapq.heappop(self._by_rank)
            if self._serial_of.get(entry[2]) == entry[1]:
                entries.append(entry)
        for entry in entries:
            heapq.heappush(self._by_rank, entry)
        return [entry[2] for entry in entries]

    def take(self, sequence: TokenSequence) -> None:
        """Removes a sequence that starts now; counts if it overtakes the oldest."""
        self.discard(sequence)
        oldest = self._oldest()
        if oldest is None or oldest.order > sequence.order:
            return
        oldest.num_overtaken += 1
        if oldest.num_overtaken == self._max_overtaken:
            self.discard(oldest)
            oldest.is_due = True
            self.add(oldest)

    def step_back(self, sequence: TokenSequence) -> None:
        """Moves a late sequence behind all sequences of its priority that are not late."""
        self.discard(sequence)
        sequence.is_late = True
        self.add(sequence)

    def _oldest(self) -> TokenSequence | None:
        while self._by_order:
            _, serial, sequence = self._by_order[0]
            if self._serial_of.get(sequence) == serial:
                return sequence
            heapq.heappop(self._by_order)
        return None
