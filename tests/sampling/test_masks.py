"""A request's lists as padded arrays, and what they refuse."""

import numpy as np
import pytest

from jinfer.errors import RequestError
from jinfer.sampling import masks


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 200, 32_000])
def test_pack_bits_sets_exactly_the_ids(vocab: int) -> None:
    ids = np.flatnonzero(np.random.default_rng(vocab).random(vocab) < 0.3)
    bits_W = masks.pack_bits(ids, vocab)
    assert bits_W.shape == (masks.num_words(vocab),) and bits_W.dtype == np.uint32
    got = [v for v in range(vocab) if int(bits_W[v // 32]) >> (v % 32) & 1]
    assert got == ids.tolist()


def test_allowed_bits() -> None:
    def tokens(bits_W: np.ndarray) -> list[int]:
        return [v for v in range(40) if int(bits_W[v // 32]) >> (v % 32) & 1]

    assert (masks.allowed_bits(40) == 0xFFFFFFFF).all()
    assert tokens(masks.allowed_bits(40, allowed_ids=[3, 35])) == [3, 35]
    assert tokens(masks.allowed_bits(40, allowed_ids=[3, 35], banned_ids=[35])) == [3]
    assert len(tokens(masks.allowed_bits(40, banned_ids=[0, 39]))) == 38


@pytest.mark.parametrize("allowed, banned", [([], []), ([4], [4]), (None, range(40))])
def test_allowed_bits_refuse_an_empty_choice(allowed: list[int] | None, banned: masks.Ids) -> None:
    with pytest.raises(RequestError, match="at least one token to sample; got none.*Allow a token"):
        masks.allowed_bits(40, allowed_ids=allowed, banned_ids=banned)


@pytest.mark.parametrize("token", [-1, 40, 2**40])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    message = rf"must lie in 0 to 39; got {token}\. Use ids of this model's tokenizer"
    for build in (
        lambda: masks.pack_bits([token], 40),
        lambda: masks.pad_stop_ids([token], 40),
        lambda: masks.pad_bias({token: 1.0}, 40),
        lambda: masks.pad_bad_words([[1, token]], 40),
    ):
        with pytest.raises(RequestError, match=message):
            build()


def test_stop_ids_are_padded_with_the_vocabulary() -> None:
    assert masks.pad_stop_ids([9, 2, 9], 40).tolist() == [2, 9] + [40] * 62
    masks.pad_stop_ids(range(64), 100)
    with pytest.raises(RequestError, match="at most 64 stop token ids; got 65. Drop some"):
        masks.pad_stop_ids(range(65), 100)


def test_bias_keeps_ids_beside_values() -> None:
    ids_J, values_J = masks.pad_bias({7: 1.5, 3: -2.0}, 40)
    assert ids_J.tolist() == [7, 3] + [40] * 1022
    assert values_J.tolist() == [1.5, -2.0] + [0.0] * 1022
    masks.pad_bias(dict.fromkeys(range(1024), 0.5), 2000)
    with pytest.raises(RequestError, match="at most 1024 logit_bias entries; got 1025"):
        masks.pad_bias(dict.fromkeys(range(1025), 0.5), 2000)


def test_bad_words_are_aligned_to_the_right() -> None:
    padded_J8 = masks.pad_bad_words([[1, 2], list(range(8))], 40)
    assert padded_J8.shape == (128, 8)
    assert padded_J8[0].tolist() == [40] * 6 + [1, 2]
    assert padded_J8[1].tolist() == list(range(8))
    assert (padded_J8[2:] == 40).all()


def test_bad_words_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(RequestError, match="at most 128 bad_words of several tokens; got 129"):
        masks.pad_bad_words([[1, 2]] * 129, 40)
    with pytest.raises(RequestError, match=r"1 to 8 tokens; got 9: \[1, 1.*shorter word"):
        masks.pad_bad_words([[1] * 9], 40)
    with pytest.raises(RequestError, match=r"1 to 8 tokens; got 0: \[\]"):
        masks.pad_bad_words([[]], 40)


def test_history_of_a_request_that_resumes() -> None:
    assert masks.recent_window([], 40).tolist() == [40] * 7
    assert masks.recent_window([5, 6], 40).tolist() == [40] * 5 + [5, 6]
    assert masks.recent_window(range(10), 40).tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_seed_words_keep_64_bits_and_tell_continuations_apart() -> None:
    assert masks.seed_words(7, 0).tolist() == [0, 7]
    assert masks.seed_words((3 << 32) + 7, 0).tolist() == [3, 7]
    assert masks.seed_words(-1, 0).tolist() == [2**32 - 1, 2**32 - 1]
    assert masks.seed_words(0, 1).dtype == np.uint32
    keys = {tuple(masks.seed_words(s, i).tolist()) for s in (0, 1, 2**40, -5) for i in range(500)}
    assert len(keys) == 4 * 500
    # Fixed for good: another digest would change every sampled output of n > 1.
    assert masks.seed_words(7, 1).tolist() == [496950915, 681228032]
