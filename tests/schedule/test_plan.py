"""Which positions of a chunk want logits."""

import pytest

from jinfer.axes import Slot
from jinfer.schedule.plan import Chunk
from jinfer.schedule.sequence import TokenSequence


@pytest.mark.parametrize(
    ("start", "num_tokens", "samples", "num_logits_rows", "scored"),
    [
        (0, 6, True, 6, [0, 1, 2, 3, 4]),  # a whole prompt of six, scored
        (0, 6, True, 1, []),  # the same, not scored
        (0, 3, False, 3, [0, 1, 2]),  # its first half
        (3, 3, True, 3, [3, 4]),  # its second
        (5, 1, True, 1, []),  # its last token
        (0, 3, False, 0, []),  # mid-prefill
        (0, 5, False, 2, [3, 4]),  # resumed, 0 .. 2 delivered before
        (0, 8, True, 3, [3, 4]),  # resumed with two outputs
        (7, 1, True, 1, []),  # decoding
    ],
)
def test_scored_positions(
    start: int,
    num_tokens: int,
    samples: bool,
    num_logits_rows: int,
    scored: list[int],
) -> None:
    sequence = TokenSequence("a", 0, list(range(6)), max_length=20, scores_prompt=True)
    chunk = Chunk(sequence, Slot(0), start, num_tokens, samples, num_logits_rows)
    assert list(chunk.scored_positions) == scored
    assert len(scored) + samples == num_logits_rows
    assert chunk.stop == start + num_tokens
    assert chunk.decodes == (num_tokens == 1)  # all of those here draw, and read nothing else


@pytest.mark.parametrize(
    ("num_tokens", "samples", "num_logits_rows"),
    [
        (1, False, 0),  # mid-prefill, in chunks of one token
        (1, False, 1),  # the same, scored
        (2, True, 1),
        (2, True, 2),
    ],
)
def test_what_does_not_decode(num_tokens: int, samples: bool, num_logits_rows: int) -> None:
    sequence = TokenSequence("a", 0, list(range(6)), max_length=20, scores_prompt=True)
    assert not Chunk(sequence, Slot(0), 0, num_tokens, samples, num_logits_rows).decodes
