"""Reads the tokenizer's configuration files of a model folder into one form."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinfer.errors import CheckpointError

# Tokens that a vocabulary lacks get new ids in this order, as in transformers.
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedToken:
    """A token that is matched in text as a whole, before all other tokens."""

    content: str
    special: bool
    lstrip: bool = False  # removes white space before it
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """The contents of a tokenizer's configuration files, in one form."""

    folder: Path
    added: dict[int, AddedToken] = field(default_factory=dict)  # by token id
    overrides: bool = False  # whether the flags of `added` override those of tokenizer.json
    named: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>"
    specials: tuple[AddedToken, ...] = ()  # the named tokens, then further special tokens
    add_bos: bool | None = None  # None: not in the file
    add_eos: bool | None = None
    legacy: bool = True  # sentencepiece: every part of a text gets a leading space
    tokenizer_class: str = ""
    chat_templates: dict[str, str] = field(default_factory=dict)


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json and templates.

    Each file is optional. tokenizer_config.json overrides the older files.

    Raises:
      CheckpointError: a file is damaged, or a value has a wrong type.
    """
    path = folder / "tokenizer_config.json"
    config = _read_json(path)
    older = _read_json(folder / "special_tokens_map.json")
    named = _named_tokens(path, config, older)
    further = _further_specials(path, config, older)
    specials = {token.content: token for token in (*further, *named.values())}
    overrides = "added_tokens_decoder" in config
    return TokenizerFiles(
        folder=folder,
        added=_newer_added(path, config) if overrides else _older_added(folder, specials),
        overrides=overrides,
        named={name: token.content for name, token in named.items()},
        specials=(*named.values(), *further),
        add_bos=_flag(path, config, "add_bos_token"),
        add_eos=_flag(path, config, "add_eos_token"),
        legacy=_flag(path, config, "legacy") is not False,
        tokenizer_class=str(config.get("tokenizer_class") or ""),
        chat_templates=_chat_templates(folder, config),
    )


def _named_tokens(
    path: Path, config: Mapping[str, Any], older: Mapping[str, Any]
) -> dict[str, AddedToken]:
    """Special tokens by name: the usual ones, then a model's own, such as image_token."""
    named = {}
    for name in _NAMED_TOKENS:
        # A null in the newer file means: no such token.
        said = config[name] if name in config else older.get(name)
        if said is not None:
            named[name] = _special_token(path, name, said)
    for name, said in config.items():
        if name.endswith("_token") and name not in named and isinstance(said, str | dict):
            named[name] = _special_token(path, name, said)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= {name: _special_token(path, name, said) for name, said in extra.items()}
    return named


def _further_specials(
    path: Path, config: Mapping[str, Any], older: Mapping[str, Any]
) -> list[AddedToken]:
    """Special tokens without a name; extra_special_tokens is the newer key."""
    for file, key in itertools.product(
        (config, older), ("extra_special_tokens", "additional_special_tokens")
    ):
        said = file.get(key)
        if said and not isinstance(said, dict):
            return [_special_token(path, key, one) for one in _checked(path, key, said, list)]
        if key == "additional_special_tokens" and key in file:
            break  # an empty list in the newer file means: none
    return []


def _newer_added(path: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens of tokenizer_config.json; transformers reads no others where it has this key."""
    added = {}
    key = "added_tokens_decoder"
    for token_id, entry in _checked(path, key, config[key], dict).items():
        if not token_id.isdecimal():
            raise damaged(path, f"{key} has the key {token_id!r}, not a token id")
        added[int(token_id)] = _added_token(path, key, _checked(path, key, entry, dict))
    return added


def _older_added(folder: Path, specials: Mapping[str, AddedToken]) -> dict[int, AddedToken]:
    path = folder / "added_tokens.json"
    return {
        _checked(path, content, token_id, int): specials.get(
            content, AddedToken(content=content, special=False, normalized=True)
        )
        for content, token_id in _read_json(path).items()
    }


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; template files override tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    said = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(said, str):
        templates["default"] = said
    elif said is not None:
        for entry in _checked(path, "chat_template", said, list):
            entry = _checked(path, "chat_template", entry, dict)
            name = _checked(path, "chat_template name", entry.get("name"), str)
            templates[name] = _checked(path, name, entry.get("template"), str)
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(folder / "chat_template.jinja")
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = read_text(extra)
    return templates


def _added_token(path: Path, name: str, said: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        content=_checked(path, name, said.get("content"), str),
        **{flag: _flag(path, said, flag) is True for flag in FLAGS},
    )


def _special_token(path: Path, name: str, said: Any) -> AddedToken:
    """A token that is special by its name; the file has a string, or a dict with "content"."""
    if isinstance(said, dict):
        return replace(_added_token(path, name, said), special=True)
    return AddedToken(content=_checked(path, name, said, str), special=True)


def _flag(path: Path, config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    return None if value is None else _checked(path, name, value, bool)


def _checked(path: Path, name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise damaged(path, f"{name} must be {kind.__name__}, and is {value!r:.60}")
    return value


def read_text(path: Path) -> str:
    """Reads a file's text; raises CheckpointError if it is unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _checked(path, "the whole file", json.loads(read_text(path)), dict)
    except (json.JSONDecodeError, RecursionError) as error:
        raise damaged(path, f"not JSON: {error}") from error


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a damaged file; names it."""
    return CheckpointError(
        f"{path.name} must be readable; got {str(path)!r}: {why}. Download the file again."
    )
