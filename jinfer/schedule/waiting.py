"""Who waits, in the order in which they may begin; and that nobody waits for ever."""

import heapq
from collections.abc import Iterator

from jinfer.schedule.sequence import TokenSequence


class WaitingQueue:
    """Sequences in order of rank: by priority, then by arrival.

    Others may begin before one that came earlier: because of their priority, because more of
    their prefix is known, or because it is late in any case and they are not. So that it is not
    overtaken for ever, the one that came first counts, and is due once `max_overtaken` others
    began before it: a due sequence has a rank before all that are not, here and while it runs. A
    sequence with k older ones is therefore overtaken at most `max_overtaken` * (k + 1) times, and
    when it is due and the oldest of those, nobody takes its pages.
    """

    def __init__(self, max_overtaken: int) -> None:
        self._max_overtaken = max_overtaken
        # Heaps of (rank or order, serial, sequence). An entry counts if its serial is the
        # sequence's latest; the others are skipped when they come up.
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
        """Takes out one that begins no more."""
        del self._serial_of[sequence]

    def first(self, count: int) -> list[TokenSequence]:
        """Those that come first, at most `count`; they stay."""
        entries = []
        while self._by_rank and len(entries) < count:
            entry = heapq.heappop(self._by_rank)
            if self._serial_of.get(entry[2]) == entry[1]:
                entries.append(entry)
        for entry in entries:
            heapq.heappush(self._by_rank, entry)
        return [entry[2] for entry in entries]

    def take(self, sequence: TokenSequence) -> None:
        """Takes out one that begins now; the oldest one may have been overtaken by it."""
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
        """Puts one behind all of its priority that are not late."""
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
