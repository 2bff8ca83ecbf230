"""Two tokenizer libraries behind one interface."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from jinfer.errors import CheckpointError
from jinfer.request.tokenizer_files import FLAGS, AddedToken, TokenizerFiles, damaged, read_text

_SPACE_MARK = "▁"  # U+2581, how sentencepiece spells a space inside a piece
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Hugging Face 4.x: these classes obey the flags add_bos_token and add_eos_token; all others ignore
# them and use the post-processor of tokenizer.json. (5.x ignores the flags of every model with a
# tokenizer.json, so DeepSeek-R1 loses its bos token.)
_CLASSES_RULED_BY_FLAGS = ("Llama", "CodeLlama", "Gemma", "Cohere")


class Backend(Protocol):
    """The interface to one tokenizer library."""

    vocab_size: int  # one past the largest id
    special_ids: frozenset[int]
    strips_first_space: bool  # whether decoding drops one space at the start of the text

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def token_id(self, content: str) -> int | None: ...

    def token(self, token_id: int) -> str | None: ...

    def vocab(self) -> dict[str, int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class HFBackend:
    """`tokenizer.json` through the `tokenizers` library."""

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        text = read_text(path)
        try:
            self._library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise damaged(path, str(error)) from error
        self._library.no_truncation()
        self._library.no_padding()
        self._add_tokens(path, files)
        decoder = self._library.decoder
        steps = None if decoder is None else json.loads(decoder.__getstate__())
        self._to_bytes, self.strips_first_space = _byte_reading(path, steps)
        added = self._library.get_added_tokens_decoder()
        self._literal: dict[int, bytes] = {}  # added tokens that are not spelt as bytes
        if self._to_bytes is _from_byte_level:
            self._literal = {
                token_id: token.content.encode(errors="replace")
                for token_id, token in added.items()
                if not self._is_spelt_as_bytes(token_id, token.content)
            }
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(self._library.get_vocab_size(), max(added, default=-1) + 1)
        self._frame = self._framing(files)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._frame is None:
            return self._library.encode(text, add_special_tokens=add_special_tokens).ids
        ids = self._library.encode(text, add_special_tokens=False).ids
        before, after = self._frame if add_special_tokens else ([], [])
        return [*before, *ids, *after]

    def token_id(self, content: str) -> int | None:
        return self._library.token_to_id(content)

    def token(self, token_id: int) -> str | None:
        return self._library.id_to_token(token_id) if token_id >= 0 else None

    def vocab(self) -> dict[str, int]:
        return self._library.get_vocab(with_added_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._literal:
            return self._literal[token_id]
        token = self.token(token_id)
        return b"" if token is None else self._to_bytes(token)

    def _is_spelt_as_bytes(self, token_id: int, content: str) -> bool:
        """Whether text becomes this added token through the bytes that its letters spell.

        So for a token of the vocabulary that is also an added one, such as GPT-2's "ĊĊ" for two
        line ends. Other added tokens stand for their own letters: "école" is no byte 0xE9.
        """
        if content.isascii():
            return False
        try:
            text = _from_byte_level(content).decode()
        except UnicodeDecodeError:
            return False
        return text != content and self._library.encode(text, add_special_tokens=False).ids == [
            token_id
        ]

    def _add_tokens(self, path: Path, files: TokenizerFiles) -> None:
        """Adds the tokens that only other files name, and sets the flags that other files give."""
        known = {
            token.content: _our_token(token)
            for token in self._library.get_added_tokens_decoder().values()
        }
        wanted = _merged_tokens(known, files)
        changed = [token for content, token in wanted.items() if known.get(content) != token]
        self._library.add_tokens([_library_token(token) for token in changed])
        for token_id, token in files.added.items():
            if token.content not in known and self.token_id(token.content) != token_id:
                raise CheckpointError(
                    f"added tokens must agree with {path.name}; got {token.content!r} as "
                    f"id {token_id} where the vocabulary gives it "
                    f"{self.token_id(token.content)}. Download both files again."
                )

    def _framing(self, files: TokenizerFiles) -> tuple[list[int], list[int]] | None:
        """Ids that the flags put before and after a text; None: the post-processor adds them."""
        ruled = files.tokenizer_class.startswith(_CLASSES_RULED_BY_FLAGS)
        if not ruled or (files.add_bos is None and files.add_eos is None):
            return None
        usual = self._library.encode("", add_special_tokens=True).ids
        ends = []
        for name, said in (("bos_token", files.add_bos), ("eos_token", files.add_eos)):
            token = files.named.get(name)
            token_id = None if token is None else self._library.token_to_id(token)
            wanted = token_id in usual if said is None else said
            ends.append([token_id] if wanted and token_id is not None else [])
        return ends[0], ends[1]


def _merged_tokens(known: dict[str, AddedToken], files: TokenizerFiles) -> dict[str, AddedToken]:
    """The added tokens of all files by content, in the order in which missing ones get ids.

    As in transformers: flags of tokenizer_config.json override those of tokenizer.json, and a token
    is special if either file says so, or if it has a name or is listed as a special token.
    """
    merged = dict(known)
    for _, token in sorted(files.added.items()):
        old = merged.get(token.content)
        if old is None:
            merged[token.content] = token
        elif files.overrides:
            merged[token.content] = replace(token, special=token.special or old.special)
    for token in files.specials:
        merged[token.content] = replace(merged.get(token.content, token), special=True)
    return merged


def _our_token(token: tokenizers.AddedToken) -> AddedToken:
    return AddedToken(content=token.content, **{flag: getattr(token, flag) for flag in FLAGS})


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token.content, **{flag: getattr(token, flag) for flag in FLAGS})


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes as printable characters, inverted.

    Printable Latin-1 characters stand for themselves; other bytes, in order, are U+0100 and up.
    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # no byte-level token: plain text
        return token.encode(errors="replace")


def _byte_reading(path: Path, decoder: Any) -> tuple[Callable[[str], bytes], bool]:
    """Makes a function from one token to its bytes, from the decoder of tokenizer.json.

    Returns:
      The function, and whether one space at the start of the text is dropped.

    Raises:
      NotImplementedError: the decoder does not work on the bytes of single tokens.
    """
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else [decoder]
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    strips = False
    replacements: list[tuple[str, str]] = []
    for index, step in enumerate(steps):
        match step:
            case {"type": "ByteLevel" | "ByteFallback" | "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                replacements.append((mark, " "))
                strips = step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if (
                "Fuse" in kinds[:index]
            ):
                strips = True
            case _:
                raise NotImplementedError(
                    "the decoder of tokenizer.json must be made of ByteLevel, ByteFallback, "
                    "Metaspace, Replace, Fuse and Strip; got "
                    f"{json.dumps(step):.80} in {str(path)!r}. Use a checkpoint with one of these."
                )
    if "ByteLevel" in kinds:
        return _from_byte_level, strips
    return _from_pieces(replacements, has_byte_pieces="ByteFallback" in kinds), strips


def _from_pieces(
    replacements: list[tuple[str, str]], *, has_byte_pieces: bool
) -> Callable[[str], bytes]:
    def read(token: str) -> bytes:
        if has_byte_pieces and (byte := _BYTE_PIECE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode(errors="replace")

    return read


class SentencePieceBackend:
    """`tokenizer.model` through the `sentencepiece` library.

    The library does not recognise control tokens in text, so the text is first split at them, as in
    Hugging Face's Llama tokenizer (4.x). With `legacy` every part gets a dummy leading space, else
    the first part only. (5.x converts the model to `tokenizers` and differs from sentencepiece
    if a part begins with its own space.)
    """

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        self._first, self._later = _load_model(path)
        library = self._first
        num_pieces = library.get_piece_size()
        self.strips_first_space = library.encode_as_pieces("a")[:1] != ["a"]
        if not self.strips_first_space or files.legacy:
            self._later = library
        self.named = {
            name: library.id_to_piece(token_id)
            for name, token_id in (
                ("bos_token", library.bos_id()),
                ("eos_token", library.eos_id()),
                ("unk_token", library.unk_id()),
                ("pad_token", library.pad_id()),
            )
            if token_id >= 0
        } | files.named
        self._added = self._recognised(path, files, num_pieces)
        self._id_of = {token.content: token_id for token_id, token in self._added.items()}
        longest_first = sorted(self._id_of, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.vocab_size = max(num_pieces, *(i + 1 for i in self._added), 0)
        bos = self._id_of.get(self.named.get("bos_token", ""))
        eos = self._id_of.get(self.named.get("eos_token", ""))
        # Llama's own default: begin with bos, do not end with eos.
        self._before = [bos] if bos is not None and files.add_bos is not False else []
        self._after = [eos] if eos is not None and files.add_eos is True else []

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = list(self._before) if add_special_tokens else []
        start, strip_left = 0, False
        for match in self._cut.finditer(text):
            token_id = self._id_of[match[0]]
            token = self._added[token_id]
            ids += self._encode_between(text, start, match.start(), strip_left, token.lstrip)
            ids.append(token_id)
            start, strip_left = match.end(), token.rstrip
        ids += self._encode_between(text, start, len(text), strip_left, False)
        return ids + self._after if add_special_tokens else ids

    def token_id(self, content: str) -> int | None:
        if content in self._id_of:
            return self._id_of[content]
        token_id = self._first.piece_to_id(content)
        return token_id if self._first.id_to_piece(token_id) == content else None

    def token(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id].content
        if not 0 <= token_id < self._first.get_piece_size():
            return None
        return self._first.id_to_piece(token_id)

    def vocab(self) -> dict[str, int]:
        tokens = ((self.token(token_id), token_id) for token_id in range(self.vocab_size))
        return {token: token_id for token, token_id in tokens if token is not None}

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode(errors="replace")
        if not 0 <= token_id < self._first.get_piece_size():
            return b""
        piece = self._first.id_to_piece(token_id)
        if self._first.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()

    def _encode_between(
        self, text: str, start: int, stop: int, strip_left: bool, strip_right: bool
    ) -> list[int]:
        part = text[start:stop]
        part = part.lstrip() if strip_left else part
        part = part.rstrip() if strip_right else part
        library = self._first if start == 0 else self._later
        return library.encode_as_ids(part) if part else []

    def _recognised(
        self, path: Path, files: TokenizerFiles, num_pieces: int
    ) -> dict[int, AddedToken]:
        """Tokens at which text is split: control pieces, and tokens of the files."""
        library = self._first
        found = {
            i: AddedToken(content=library.id_to_piece(i), special=True)
            for i in range(num_pieces)
            if library.is_control(i) or library.is_unknown(i)
        }
        for token_id, token in files.added.items():
            if token_id < num_pieces and library.id_to_piece(token_id) != token.content:
                raise CheckpointError(
                    f"added tokens must agree with {path.name}; got {token.content!r} as id "
                    f"{token_id}, which is {library.id_to_piece(token_id)!r} there. "
                    "Download both files again."
                )
            found[token_id] = token
        ids = {token.content: token_id for token_id, token in found.items()}
        by_name = [AddedToken(content=content, special=True) for content in self.named.values()]
        for token in (*files.specials, *by_name):
            token_id = ids.get(token.content)
            if token_id is None:
                token_id = library.piece_to_id(token.content)
                if library.id_to_piece(token_id) != token.content:  # no piece: a new id past them
                    token_id = max(num_pieces, *(i + 1 for i in found))
                ids[token.content] = token_id
            found[token_id] = replace(found.get(token_id, token), special=True)
        return found


def _load_model(
    path: Path,
) -> tuple[sentencepiece.SentencePieceProcessor, sentencepiece.SentencePieceProcessor]:
    """Loads the model twice: with and without a dummy space before the text."""
    model = path.read_bytes()
    # Protobuf merges an appended message; its values override earlier ones:
    # field 3 (normalizer_spec), 2 bytes long: its field 3 (add_dummy_prefix) = false.
    without_prefix = model + b"\x1a\x02\x18\x00"
    try:
        first = sentencepiece.SentencePieceProcessor(model_proto=model)
        later = sentencepiece.SentencePieceProcessor(model_proto=without_prefix)
        first.get_piece_size()
        first.encode_as_ids("a")
    except (RuntimeError, ValueError) as error:
        raise damaged(path, str(error)) from error
    return first, later
