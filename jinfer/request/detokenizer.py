"""Converts token ids to text as they arrive; never splits a character."""

import codecs
import itertools
from collections.abc import Iterable, Sequence

from jinfer.request.tokenizer import Tokenizer

# A character has at most 4 bytes, so an unfinished one spans at most 3 tokens that have bytes.
_UNFINISHED_TOKENS = 3


class Detokenizer:
    """Text of one completion, token by token; constant work per token.

    All pieces joined equal `tokenizer.decode` of all ids. With `prompt_ids` the pieces continue the
    prompt's text: " world" after "Hello" keeps its space, which it loses when decoded alone.

    A prompt may end inside a character. The output has the character if its first tokens complete
    it; otherwise the U+FFFD belongs to the prompt's text, and the output begins behind it. An
    output that ends inside a character ends with U+FFFD.

    Args:
      tokenizer: the tokenizer of the ids.
      skip_special_tokens: leaves special tokens out of the text.
      prompt_ids: tokens of the prompt before the completion.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        # Invalid bytes become U+FFFD; the decoder keeps an unfinished character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = tokenizer.strips_first_space and not any(
            self._bytes_of(token_id) for token_id in prompt_ids
        )
        shown = (data for token_id in reversed(prompt_ids) if (data := self._bytes_of(token_id)))
        for data in reversed(list(itertools.islice(shown, _UNFINISHED_TOKENS))):
            self._decoder.decode(data)
        # Whether the first character begins in the prompt.
        self._begins_in_prompt = bool(self._decoder.getstate()[0])

    def feed(self, token_ids: Iterable[int]) -> str:
        """Returns the text completed by these tokens; empty while a character is unfinished."""
        return self._emit(b"".join(map(self._bytes_of, token_ids)), final=False)

    def flush(self) -> str:
        """Returns the rest at the end: U+FFFD for an unfinished character, else nothing."""
        return self._emit(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._token_bytes(token_id)

    def _emit(self, data: bytes, *, final: bool) -> str:
        text = self._decoder.decode(data, final)
        if text and self._begins_in_prompt:
            self._begins_in_prompt = False
            text = text.removeprefix("\N{REPLACEMENT CHARACTER}")
        if text and self._strips_space:
            self._strips_space = False
            return text.removeprefix(" ")
        return text
