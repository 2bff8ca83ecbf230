"""The bad words of one completion: the token sequences to ban, and the search for more."""

from collections.abc import Sequence
from copy import copy

from jinfer.errors import RequestError, shown
from jinfer.request.param_checks import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from jinfer.request.tokenizer import Tokenizer

Spelling = tuple[int, ...]


class BadWords:
    """Token sequences that the device may not complete, so that no bad word is written.

    The device compares tokens, and a word can be cut into tokens in hundreds of ways. At first it
    bans the tokenizer's own spellings, at the start of a text and after a space. `completed` finds
    every other spelling when its last token comes. The engine then takes that token back, `ban`
    adds the spelling, and another token is sampled in its place.

    A match inside a longer word does not count if its own tokens show the longer word: "cat" bans
    neither the token "concatenate" nor "c" and "ats". Only digits and letters with case can make a
    word longer, since scripts without case may have no spaces between words.

    Args:
      words: the user's words; spaces before them do not count.
      tokenizer: the tokenizer of the ids; None only without words.
      vocab_size: ids from here on cannot be sampled.

    Raises:
      RequestError: a word is only spaces.
    """

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._words: list[bytes] = []
        self._banned: dict[Spelling, None] = {}  # in the order in which they were found
        self._num_taken_back = (0, 0)  # length of the output, and tokens refused at its end
        if tokenizer is None:
            return
        self._special_ids, self._token_bytes = tokenizer.special_ids, tokenizer.token_bytes
        for word in words:
            bare = word.lstrip()
            if not bare:
                raise RequestError(
                    f"a bad word must be more than spaces; got {word!r}. "
                    "Ban a token with a logit_bias of -100."
                )
            self._words.append(bare.encode())
            for text in (bare, " " + bare):
                ids = tuple(tokenizer.encode(text, add_special_tokens=False))
                known = tokenizer.unk_token_id not in ids and max(ids, default=0) < vocab_size
                if known and 0 < len(ids) <= MAX_BAD_WORD_TOKENS:
                    self._banned[ids] = None
        self._num_tail_bytes = max(map(len, self._words), default=1) - 1

    @property
    def spellings(self) -> tuple[Spelling, ...]:
        """The sequences to ban: all single tokens, and the newest longer ones that fit a slot."""
        several = [ids for ids in self._banned if len(ids) > 1][-MAX_BAD_WORDS:]
        return (*(ids for ids in self._banned if len(ids) == 1), *several)

    def copy(self) -> "BadWords":
        """Returns an object with the same words and bans, for another completion."""
        other = copy(self)
        other._banned = dict(self._banned)
        return other

    def completed(self, output_ids: Sequence[int]) -> Spelling:
        """The last tokens of an output, if the very last completes a bad word; else none."""
        if not self._words or not (last := self._bytes_of(output_ids[-1])):
            return ()
        pieces, num_before = [last], 0
        while len(pieces) < len(output_ids) and num_before < self._num_tail_bytes:
            pieces.append(self._bytes_of(output_ids[-1 - len(pieces)]))
            num_before += len(pieces[-1])
        pieces.reverse()
        text = b"".join(pieces)
        for word in self._words:
            start = text.find(word, max(0, num_before - len(word) + 1))
            while start >= 0:
                if num_tokens := _num_spelling_tokens(pieces, start, start + len(word)):
                    return tuple(output_ids[-min(num_tokens, MAX_BAD_WORD_TOKENS) :])
                start = text.find(word, start + 1)
        return ()

    def ban(self, spelling: Spelling, length: int) -> None:
        """Adds a spelling that `completed` found.

        Args:
          spelling: the last tokens.
          length: tokens of the output without the last one.

        Raises:
          RequestError: it was banned and came nevertheless, since no other token was left; or this
            place needs more bans than fit in a slot.
        """
        before, num_here = self._num_taken_back
        num_here = num_here + 1 if before == length else 1
        self._num_taken_back = length, num_here
        if spelling in self.spellings or (len(spelling) > 1 and num_here > MAX_BAD_WORDS):
            words = shown([word.decode() for word in self._words])
            raise RequestError(
                f"bad_words must leave a way to go on; got bad_words={words} with none after "
                f"{length} tokens of output. Drop a word, or allow more tokens."
            )
        self._banned.pop(spelling, None)  # it may be there, but too old to fit
        self._banned[spelling] = None

    def _bytes_of(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self._token_bytes(token_id)


def _num_spelling_tokens(pieces: Sequence[bytes], start: int, stop: int) -> int:
    """How many of the last tokens spell bytes `start` to `stop`; 0 if these show a longer word.

    Args:
      pieces: the bytes of each token.
      start: first byte of the word in all pieces joined.
      stop: one past its last byte, in the last piece.
    """
    text, first, first_start = b"".join(pieces), 0, 0
    while first_start + len(pieces[first]) <= start:
        first_start += len(pieces[first])
        first += 1
    word = text[start:stop].decode()
    before = text[first_start:start].decode(errors="ignore")
    after = text[stop:].decode(errors="ignore")
    if _in_one_word(before[-1:], word[0]) or _in_one_word(word[-1], after[:1]):
        return 0
    return len(pieces) - first


def _in_one_word(left: str, right: str) -> bool:
    return all(char.isdigit() or char.lower() != char.upper() for char in (left, right))
