"""Reads the tokenizer's configuration files of a model folder into one form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinfer.errors import CheckpointError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


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
    named: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>"
    specials: tuple[str, ...] = ()  # contents of further special tokens
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
    config = _read_json(folder / "tokenizer_config.json")
    older = _read_json(folder / "special_tokens_map.json")
    added = {
        _checked(folder / "added_tokens.json", content, token_id, int): AddedToken(
            content=content, special=False, normalized=True
        )
        for content, token_id in _read_json(folder / "added_tokens.json").items()
    }
    path = folder / "tokenizer_config.json"
    for key, entry in _checked(
        path, "added_tokens_decoder", config.get("added_tokens_decoder", {}), dict
    ).items():
        if not key.isdecimal():
            raise damaged(path, f"added_tokens_decoder has the key {key!r}, not a token id")
        added[int(key)] = _added_token(path, entry)
    named = {}
    for name in _NAMED_TOKENS:
        # A null in the newer file means: no such token.
        said = config[name] if name in config else older.get(name)
        if said is not None:
            named[name] = _content(path, name, said)
    extra = config.get("additional_special_tokens", older.get("additional_special_tokens")) or []
    return TokenizerFiles(
        folder=folder,
        added=added,
        named=named,
        specials=tuple(
            _content(path, "additional_special_tokens", one)
            for one in _checked(path, "", extra, list)
        ),
        add_bos=_flag(path, config, "add_bos_token"),
        add_eos=_flag(path, config, "add_eos_token"),
        legacy=_flag(path, config, "legacy") is not False,
        tokenizer_class=str(config.get("tokenizer_class") or ""),
        chat_templates=_chat_templates(folder, config),
    )


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


def _added_token(path: Path, entry: Any) -> AddedToken:
    entry = _checked(path, "added_tokens_decoder", entry, dict)
    flags = ("special", "lstrip", "rstrip", "normalized", "single_word")
    return AddedToken(
        content=_content(path, "added_tokens_decoder", entry),
        **{name: _flag(path, entry, name) is True for name in flags},
    )


def _content(path: Path, name: str, said: Any) -> str:
    """Returns a token's content; the file has a string, or a dict with "content"."""
    return _checked(path, name, said.get("content") if isinstance(said, dict) else said, str)


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
