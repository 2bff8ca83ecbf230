"""Token ids to text while they arrive, without ever cutting a character in two."""

import codecs
from collections.abc import Iterable, Sequence

from jinfer.request.tokenizer import Tokenizer

# A character has at most 4 bytes, so an unfinished one reaches back at most 3 tokens.
_UNFINISHED_TOKENS = 3


class Detokenizer:
    """Text of one output, token by token; a fixed amount of work for each.

    Over the life of one detokenizer, the pieces joined are `tokenizer.decode` of all ids. With
    `prompt_ids` they are what the output adds to the prompt's text: " world" after "Hello", where
    decoded alone it would lose its space.

    Args:
      tokenizer: whose vocabulary the ids are of.
      skip_special_tokens: leaves special tokens out of the text.
      prompt_ids: the tokens that the output continues.
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
        # Invalid bytes become U+FFFD; the unfinished end of a character waits inside the decoder.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = tokenizer.strips_first_space and not any(
            self._bytes_of(token_id) for token_id in prompt_ids
        )
        for token_id in prompt_ids[-_UNFINISHED_TOKENS:]:
            self._decoder.decode(self._bytes_of(token_id))

    def feed(self, token_ids: Iterable[int]) -> str:
        """Text that these further tokens complete; empty while a character is unfinished."""
        return self._emit(b"".join(map(self._bytes_of, token_ids)), final=False)

    def flush(self) -> str:
        """What is left at the very end: U+FFFD for an unfinished character, else nothing."""
        return self._emit(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._token_bytes(token_id)

    def _emit(self, data: bytes, *, final: bool) -> str:
        text = self._decoder.decode(data, final)
        if text and self._strips_space:
            self._strips_space = False
            return text.removeprefix(" ")
        return text
