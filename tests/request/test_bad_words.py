"""Every way to cut a bad word into tokens is found, and no longer word is."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from request.tiny_tokenizers import KINDS, write_tokenizer

from jinfer.errors import RequestError
from jinfer.request.bad_words import BadWords
from jinfer.request.tokenizer import Tokenizer, load_tokenizer
from jinfer.shipped import target_folder

VOCAB_SIZE = 4096
MANY = 2**20


class Pieces:
    """A tokenizer whose vocabulary is a list of byte strings; token 0 is special."""

    special_ids = frozenset([0])
    unk_token_id = None

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = (b"<s>", *pieces)

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self._pieces.index(text.encode())] if text.encode() in self._pieces else []


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(target_folder())


def bad_words_of(pieces: list[bytes], *words: str) -> BadWords:
    tokenizer: Any = Pieces(*pieces)
    return BadWords(words, tokenizer, MANY)


@pytest.mark.parametrize(
    ("word", "pieces", "num_tokens"),
    [
        ("cat", [b"cat"], 1),
        ("cat", [b"c", b"a", b"t"], 3),
        ("cat", [b"the", b" c", b"at"], 2),
        ("cat", [b"(c", b"at"], 2),  # as GPT-4's merges have it
        ("cat", [b"\n\tcat.\n"], 1),
        ("cat", [b"a", b"c", b"a", b"t; "], 3),
        ("cat", [b"con", b"cat"], 1),  # "enate" may follow, but nobody knows yet
        ("cat", [b"cat", b"s"], 0),  # too late: the token before was the one
        ("cat", [b"concatenate"], 0),
        ("cat", [b" cats"], 0),
        ("cat", [b"cat2"], 0),
        ("cat", [b"xc", b"at"], 0),
        ("cat", [b"c", b"ats"], 0),
        ("cat", [b"cats cat"], 1),
        ("cat", [b"Cat"], 0),
        ("cat", [b"\xc3\xa9c", b"at"], 0),  # a letter beyond ASCII
        ("  cat", [b"c", b"at"], 2),
        ("a cat", [b"a", b" ", b"cat"], 3),
        ("caf\u00e9", [b"ca", b"f\xc3", b"\xa9"], 3),
        ("\u4e2d\u56fd", [b"\xe4", b"\xb8", b"\xad\xe5", b"\x9b\xbd"], 4),
        ("\u4e2d\u56fd", ["\u5728\u4e2d".encode(), "\u56fd\u4eba".encode()], 2),  # no case
        ("```", [b"``", b"`py"], 2),
        ("abcdefghij", [b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h", b"i", b"j"], 8),
    ],
)
def test_the_last_token_completes_a_word(word: str, pieces: list[bytes], num_tokens: int) -> None:
    ids = list(range(1, len(pieces) + 1))
    assert bad_words_of(pieces, word).completed(ids) == tuple(ids[len(ids) - num_tokens :])


def test_hidden_tokens_do_not_part_a_word() -> None:
    words = bad_words_of([b"c", b"at"], "other", "cat")
    assert words.completed([1, 0, 2]) == (1, 0, 2)
    assert words.completed([1, 2, 0]) == ()
    assert words.completed([0]) == ()


def test_both_spellings_are_banned_at_first_whatever_their_lengths(tokenizer: Tokenizer) -> None:
    for word in ("daughter", "fox", " the", "once upon"):
        spellings = BadWords([word], tokenizer, VOCAB_SIZE).spellings
        for text in (word.lstrip(), " " + word.lstrip()):
            assert tuple(tokenizer.encode(text, add_special_tokens=False)) in spellings
    assert [len(ids) for ids in BadWords(["daughter"], tokenizer, VOCAB_SIZE).spellings] == [1, 2]
    assert BadWords([], tokenizer, 9).spellings == BadWords([], None, 9).spellings == ()
    with pytest.raises(RequestError, match="a bad word must be more than spaces; got '  '"):
        BadWords(["  "], tokenizer, VOCAB_SIZE)


def test_words_that_fit_no_slot_are_left_to_the_search(tokenizer: Tokenizer) -> None:
    long = "supercalifragilisticexpialidocious" * 3
    words = BadWords([long], tokenizer, VOCAB_SIZE)
    assert words.spellings == ()
    ids = tokenizer.encode(long, add_special_tokens=False)
    assert words.completed(ids) == tuple(ids[-8:])
    many = [f"{a}{b}xq" for a in "abcdefghijk" for b in "abcdefghijk"]
    assert len(BadWords(many, tokenizer, VOCAB_SIZE).spellings) == 128
    # Ids that the model does not have cannot come.
    assert BadWords(["daughter"], tokenizer, 100).spellings == ()


def test_a_ban_is_kept_as_long_as_it_fits(tokenizer: Tokenizer) -> None:
    words = BadWords(["x"], tokenizer, VOCAB_SIZE)
    other = words.copy()
    at_first = words.spellings
    for place in range(200):
        words.ban((place, place), length=place)
    words.ban((7,), length=200)
    assert (0, 0) not in words.spellings and len(words.spellings) == 128 + 2
    words.ban((0, 0), length=300)
    assert words.spellings[-1] == (0, 0)
    assert other.spellings == at_first


def test_a_place_without_a_way_to_go_on_is_told(tokenizer: Tokenizer) -> None:
    words = BadWords(["x"], tokenizer, VOCAB_SIZE)
    words.ban((3, 4), length=5)
    with pytest.raises(RequestError, match=r"a way to go on; got bad_words=\['x'\] .* after 5 tok"):
        words.ban((3, 4), length=5)
    with pytest.raises(RequestError, match="Drop a word, or allow more tokens"):
        for token in range(200):
            words.ban((token, 9), length=6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_random_output_has_a_bad_word(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, kind))
    bad, rng = ["ab", "cd a", "the", "\u00e9"], random.Random(3)
    pieces = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    ids = [
        i
        for i in range(tokenizer.vocab_size)
        if i not in tokenizer.special_ids
        and set(tokenizer.token_bytes(i)) <= set(b"abcdthe \xc3\xa9")
    ]
    assert len(ids) > 9 and {b"a", b"b"} < pieces
    words, output, num_taken_back = BadWords(bad, tokenizer, MANY), [], 0
    while len(output) < 3000:
        banned = {
            s[-1] for s in words.spellings if list(s[:-1]) == output[len(output) + 1 - len(s) :]
        }
        output.append(rng.choice([i for i in ids if i not in banned]))
        if spelling := words.completed(output):
            output.pop()
            words.ban(spelling, len(output))
            num_taken_back += 1
    assert num_taken_back
    texts = [tokenizer.token_bytes(i) for i in output]
    for start, num_tokens in itertools.product(range(len(texts)), range(1, 6)):
        assert b"".join(texts[start : start + num_tokens]).strip() not in [w.encode() for w in bad]
