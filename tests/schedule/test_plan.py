"""Which positions of a chunk want logits."""

import pytest

from jinfer.axes import Slot
from jinfer.schedule.plan import Chunk
from jinfer.schedule.sequence import Sequence


@pytest.mark.parametrize(
    ("start", "num_tokens", "samples", "num_readouts", "scored", "readouts"),
    [
        (0, 6, True, 6, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]),  # a whole prompt of six, scored
        (0, 6, True, 1, [], [5]),  # the same, not scored
        (0, 3, False, 3, [0, 1, 2], [0, 1, 2]),  # its first half
        (3, 3, True, 3, [3, 4], [3, 4, 5]),  # its second
        (5, 1, True, 1, [], [5]),  # its last token
        (0, 3, False, 0, [], []),  # mid-prefill
        (0, 5, False, 2, [3, 4], [3, 4]),  # resumed, 0 .. 2 delivered before
        (0, 8, True, 3, [3, 4], [3, 4, 7]),  # resumed with two outputs
        (7, 1, True, 1, [], [7]),  # decoding
    ],
)
def test_readout_positions(
    start: int,
    num_tokens: int,
    samples: bool,
    num_readouts: int,
    scored: list[int],
    readouts: list[int],
) -> None:
    sequence = Sequence("a", 0, list(range(6)), max_length=20, scores_prompt=True)
    chunk = Chunk(sequence, Slot(0), start, num_tokens, samples, num_readouts)
    assert list(chunk.scored_positions) == scored
    assert chunk.readout_positions == readouts
    assert len(chunk.readout_positions) == num_readouts
    assert chunk.stop == start + num_tokens
    assert chunk.decodes == (num_tokens == 1)  # all of those here draw, and read nothing else


@pytest.mark.parametrize(
    ("num_tokens", "samples", "num_readouts"),
    [
        (1, False, 0),  # mid-prefill, in chunks of one token
        (1, False, 1),  # the same, scored
        (2, True, 1),
        (2, True, 2),
    ],
)
def test_what_does_not_decode(num_tokens: int, samples: bool, num_readouts: int) -> None:
    sequence = Sequence("a", 0, list(range(6)), max_length=20, scores_prompt=True)
    assert not Chunk(sequence, Slot(0), 0, num_tokens, samples, num_readouts).decodes
