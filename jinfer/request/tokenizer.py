"""Converts text to token ids and back, with a model folder's files; none of their code is run.

One class with two backends: the `tokenizers` library reads `tokenizer.json`; if there is none,
`sentencepiece` reads `tokenizer.model`.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from jinfer.errors import CheckpointError, RequestError, shown
from jinfer.request.apply_template import apply_template
from jinfer.request.chat import ChatRenderer
from jinfer.request.prompt import Prompt, require_unicode
from jinfer.request.tokenizer_backends import Backend, HFBackend, SentencePieceBackend
from jinfer.request.tokenizer_files import TokenizerFiles, read_tokenizer_files

# Arguments of transformers' apply_chat_template that are about tensors or training.
_TENSOR_OPTIONS = (
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
    "tokenizer_kwargs",
)


class Tokenizer:
    """Turns text into token ids and back; the methods have Hugging Face's names.

    A token is a string of bytes. The text of a sequence is its tokens' bytes decoded as UTF-8, with
    U+FFFD for invalid bytes, and without the leading space if the vocabulary adds one. Hugging
    Face's `clean_up_tokenization_spaces` is not applied: it removes spaces that the model wrote.
    """

    def __init__(self, backend: Backend, files: TokenizerFiles) -> None:
        self._backend = backend
        self.folder = files.folder
        self.vocab_size = backend.vocab_size  # ids are below this; it counts added tokens too
        self.special_ids = backend.special_ids
        self.strips_first_space = backend.strips_first_space
        self._named = files.named
        self.bos_token = files.named.get("bos_token")
        self.eos_token = files.named.get("eos_token")
        self.pad_token = files.named.get("pad_token")
        self.unk_token = files.named.get("unk_token")
        self.unk_token_id = self._named_id(self.unk_token)
        self.bos_token_id = self._named_id(self.bos_token)
        self.eos_token_id = self._named_id(self.eos_token)
        self.pad_token_id = self._named_id(self.pad_token)
        self.chat_templates = files.chat_templates
        self.token_bytes = functools.cache(backend.token_bytes)
        self._renderer = ChatRenderer()  # starts its process when it is used

    def __len__(self) -> int:
        return len(self._backend.vocab())

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

    def decode(self, token_ids: Iterable[int] | int, skip_special_tokens: bool = True) -> str:
        """Converts tokens to text. Ids outside the vocabulary (padded logits) add nothing."""
        token_ids = token_ids if isinstance(token_ids, Iterable) else (token_ids,)
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

    def get_vocab(self) -> dict[str, int]:
        """Every token, as the vocabulary spells it, with its id."""
        return self._backend.vocab()

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = ...) -> str | None: ...

    @overload
    def convert_ids_to_tokens(
        self, ids: Iterable[int], skip_special_tokens: bool = ...
    ) -> list[str | None]: ...

    def convert_ids_to_tokens(
        self, ids: Iterable[int] | int, skip_special_tokens: bool = False
    ) -> list[str | None] | str | None:
        """Tokens as the vocabulary spells them, of one id or of many; None for an unknown id."""
        if not isinstance(ids, Iterable):
            return self._backend.token(int(ids))
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return [self._backend.token(int(one)) for one in ids if one not in skipped]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...

    @overload
    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int | None]: ...

    def convert_tokens_to_ids(self, tokens: Iterable[str] | str) -> list[int | None] | int | None:
        """Ids of one token or of many; an unknown token has the id of unk_token, else None."""
        if not isinstance(tokens, str):
            return [self._id_or_unknown(one) for one in tokens]
        return self._id_or_unknown(tokens)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that `decode` skips, in order."""
        return sorted(self.special_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that `decode` skips, by their ids."""
        return [self._backend.token(one) or "" for one in self.all_special_ids]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by name: bos_token, eos_token and so on."""
        return dict(self._named)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **template_kwargs: Any,
    ) -> Any:
        """Renders a conversation, or a list of them, with a chat template.

        `LLM.chat` renders the same, but with the header of the assistant's turn by default.

        Args:
          conversation: a list of {"role": ..., "content": ...}, or a list of such lists.
          tools: functions the model may call, as JSON schemas.
          documents: texts for retrieval.
          chat_template: source or name of a template; None = the checkpoint's.
          add_generation_prompt: ends with the header of the assistant's turn.
          continue_final_message: ends inside the last message, which the model continues.
          tokenize: returns token ids; False = text.
          return_dict: returns {"input_ids": ..., "attention_mask": ...}; transformers 5 does so
            unless told not to.
          **template_kwargs: further variables of the template, such as enable_thinking.

        Raises:
          RequestError: there is no template, or it rejects the messages; or the argument is one of
            transformers' for tensors, which this tokenizer does not make.
        """
        options = {
            "tools": tools,
            "documents": documents,
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": _without_tensor_options(template_kwargs),
        }
        many = bool(conversation) and all(_is_conversation(one) for one in conversation)
        texts = [
            apply_template(
                self._renderer, self.chat_templates, self.template_variables, one, **options
            )
            for one in (conversation if many else [conversation])
        ]
        if not tokenize:
            return texts if many else texts[0]
        ids = [self.encode(text, add_special_tokens=False) for text in texts]
        found = ids if many else ids[0]
        if not return_dict:
            return found
        ones = [[1] * len(one) for one in ids]
        return {"input_ids": found, "attention_mask": ones if many else ones[0]}

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

    def _id_or_unknown(self, token: str) -> int | None:
        token_id = self._backend.token_id(token)
        return self.unk_token_id if token_id is None else token_id


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _without_tensor_options(template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    for name in _TENSOR_OPTIONS:
        if template_kwargs.get(name):
            raise RequestError(
                "apply_chat_template returns text or lists of token ids; got "
                f"{name}={shown(template_kwargs[name])}. Leave it out."
            )
    return {name: value for name, value in template_kwargs.items() if name not in _TENSOR_OPTIONS}


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
    """Token ids of a prompt given as text.

    An empty text has the tokens that the tokenizer adds, such as the bos token; maybe none.

    Raises:
      RequestError: there is no tokenizer, or it fails on this text.
    """
    assert prompt.text is not None, f"a prompt without text: {prompt=}"
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
