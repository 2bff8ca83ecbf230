"""A sequence's tokens and lengths."""

import pytest

from jinfer.schedule.sequence import TokenSequence


def test_tokens_span_prompt_and_outputs() -> None:
    sequence = TokenSequence("a", 0, [10, 11, 12], max_length=9)
    sequence.output_ids += [20, 21]
    whole = [10, 11, 12, 20, 21]
    for start in range(6):
        for stop in range(start, 6):
            assert sequence.tokens(start, stop) == whole[start:stop]
    assert [sequence.token_at(p) for p in range(5)] == whole
    assert (sequence.num_prompt_tokens, sequence.num_tokens) == (3, 5)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (-1, 2), (2, 1), (4, 5)])
def test_unknown_tokens_are_refused(start: int, stop: int) -> None:
    sequence = TokenSequence("a", 0, (10, 11, 12), max_length=9)
    with pytest.raises(AssertionError, match=f"{start=}, {stop=}"):
        sequence.tokens(start, stop)


def test_length_counts_tokens_in_flight() -> None:
    sequence = TokenSequence("a", 0, [1, 2, 3], max_length=5)
    assert (sequence.length, sequence.num_unscheduled) == (3, 3)
    sequence.num_scheduled, sequence.num_unread = 3, 1
    assert (sequence.num_tokens, sequence.length, sequence.num_unscheduled) == (3, 4, 1)
    sequence.num_scheduled, sequence.num_unread = 4, 2  # the last token has been drawn
    assert (sequence.length, sequence.num_unscheduled) == (5, 0)


def test_two_alike_are_not_the_same() -> None:
    a, b = TokenSequence("a", 0, [1], max_length=2), TokenSequence("a", 0, [1], max_length=2)
    assert a != b
    assert len({a, b}) == 2
