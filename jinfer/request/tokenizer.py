"""Converts text to token ids and back, with a model folder's files; none of their code is run.

One class with two backends: the `tokenizers` library reads `tokenizer.json`; if there is none,
`sentencepiece` reads `tokenizer.model`.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinfer.errors import CheckpointError, RequestError
from jinfer.request.prompt import Prompt, require_unicode
from jinfer.request.tokenizer_backends import Backend, HFBackend, SentencePieceBackend
from jinfer.request.tokenizer_files import TokenizerFiles, read_tokenizer_files


class Tokenizer:
    """Turns text into token ids and back.

    A token is a string of bytes. The text of a sequence is its tokens' bytes decoded as UTF-8, with
    U+FFFD for invalid bytes, and without the leading space if the vocabulary adds one. Hugging
    Face's `clean_up_tokenization_spaces` is not applied: it removes spaces that the model wrote.
    """

    def __init__(self, backend: Backend, files: TokenizerFiles) -> None:
        self._backend = backend
        self.folder = files.folder
        self.vocab_size = backend.vocab_size  # ids are below this
        self.special_ids = backend.special_ids
        self.strips_first_space = backend.strips_first_space
        self._named = files.named
        self.bos_token = files.named.get("bos_token")
        self.eos_token = files.named.get("eos_token")
        self.pad_token = files.named.get("pad_token")
        self.unk_token = files.named.get("unk_token")
        self.bos_token_id = self._named_id(self.bos_token)
        self.eos_token_id = self._named_id(self.eos_token)
        self.pad_token_id = self._named_id(self.pad_token)
        self.chat_templates = files.chat_templates
        self.token_bytes = functools.cache(backend.token_bytes)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Converts `text` to token ids; special tokens in the text become their ids.

        Args:
          text: any text; a rendered chat prompt already contains its special tokens.
          add_special_tokens: add the checkpoint's first and last tokens, e.g. the bos token.

        Raises:
          RequestError: the text has half of a surrogate pair, which UTF-8 cannot encode.
        """
        if not text.isascii():
            require_unicode("a prompt", text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Converts tokens to text. Ids outside the vocabulary (padded logits) add nothing."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        pieces = [self.token_bytes(one) for one in token_ids if one not in skipped]
        text = b"".join(pieces).decode(errors="replace")
        return text[1:] if self.strips_first_space and text[:1] == " " else text

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, with its leading space; for logprobs."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_id(self, content: str) -> int | None:
        """Id of the token with exactly this content, as the vocabulary spells it."""
        return self._backend.token_id(content)

    @property
    def template_variables(self) -> dict[str, str]:
        """The special tokens by their names in chat templates: bos_token, eos_token and so on."""
        return dict(self._named)

    @property
    def chat_template(self) -> str | None:
        """The default template; None if there is none."""
        return self.chat_templates.get("default")

    def _named_id(self, content: str | None) -> int | None:
        return None if content is None else self._backend.token_id(content)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads the tokenizer of a model folder.

    Raises:
      CheckpointError: a file is missing or damaged; names it.
      NotImplementedError: tokenizer.json has a decoder that does not map tokens to bytes.
    """
    folder = Path(folder)
    files = read_tokenizer_files(folder)
    if (folder / "tokenizer.json").is_file():
        backend: Backend = HFBackend(folder / "tokenizer.json", files)
    elif (folder / "tokenizer.model").is_file():
        backend = SentencePieceBackend(folder / "tokenizer.model", files)
        files.named.update({k: v for k, v in backend.named.items() if k not in files.named})
    else:
        raise CheckpointError(
            "a model folder needs tokenizer.json or tokenizer.model; "
            f"got neither in {str(folder)!r}. Copy one there, or set skip_tokenizer_init=True."
        )
    return Tokenizer(backend, files)


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> Sequence[int]:
    """Token ids of a prompt given as text; none for an empty text.

    Raises:
      RequestError: there is no tokenizer, or it fails on this text.
    """
    if not prompt.text:
        return ()  # refused as [] is, whatever tokens the tokenizer would begin with
    if tokenizer is None:
        raise RequestError(
            "text needs a tokenizer; got prompt text with skip_tokenizer_init=True. "
            "Pass prompt_token_ids."
        )
    try:
        return tokenizer.encode(prompt.text)
    except RequestError:
        raise
    except Exception as error:  # the library's own, about this prompt: only this request ends
        raise RequestError(
            f"the tokenizer must take the prompt; got {type(error).__name__}: {error}. "
            "Pass prompt_token_ids."
        ) from error
