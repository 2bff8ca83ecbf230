"""Prompts from the command line, a file or standard input."""

import codecs
import difflib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jinfer.errors import RequestError, shown
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt, as_prompt
from jinfer.request.vllm_params import VLLM_ONLY, settled

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
# Keywords of `LLM.render`.
_CHAT_KEYS = (
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "documents",
    "chat_template_kwargs",
    "cache_salt",
)
_SAMPLING_KEYS = tuple(f.name for f in fields(SamplingParams) if f.name != "output_kind")
_KNOWN_KEYS = tuple(dict.fromkeys(("id", "messages", *_PROMPT_KEYS, *_CHAT_KEYS, *_SAMPLING_KEYS)))
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One prompt of the command, and the settings of its own JSON line.

    Args:
      place: where it was written, for messages: "prompts.txt, line 3".
      prompt: None for a conversation.
      messages: of a conversation; None for a prompt.
      template_args: keywords of `LLM.render`, for a conversation.
      sampling: keywords of SamplingParams, which win over the command's flags.
      entry_id: the user's name for it; None = none.
    """

    place: str
    prompt: Prompt | None = None
    messages: Any = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    entry_id: str | int | None = None


def read_prompts(words: Sequence[str], file: str | None, *, chat: bool = False) -> list[Entry]:
    """Reads all prompts, in the given order; the prompts of `file` come last.

    Args:
      words: the prompts of the command line; "-" stands for standard input.
      file: a file with one prompt or JSON object per line; None = no file.
      chat: each text is a message of a user.

    Raises:
      RequestError: there is no prompt, or one cannot be read.
    """
    if not words and file is None:
        if sys.stdin.isatty():
            raise RequestError(
                "generate needs a prompt; got none. "
                'Write one, as in `jinfer generate "Once upon a time"`, or use --file.'
            )
        words = ["-"]
    entries: list[Entry] = []
    for word in words:
        entries += _standard_input() if word == "-" else [_from_word(word, len(entries) + 1)]
    if file is not None:
        entries += _from_file(file)
    if not entries:
        raise RequestError(f"there must be a prompt; got none in {file or 'standard input'}.")
    return [_as_chat(entry) for entry in entries] if chat else entries


def _as_chat(entry: Entry) -> Entry:
    """The entry with its text as a user's message."""
    if entry.prompt is None:
        return entry
    text, salt = entry.prompt.text, entry.prompt.cache_salt
    if text is None:
        raise RequestError(
            f"{entry.place}: --chat takes text or messages; got prompt_token_ids. "
            "Leave --chat out for token ids."
        )
    return Entry(
        place=entry.place,
        messages=[{"role": "user", "content": text}],
        template_args={"cache_salt": salt} if salt else {},
        sampling=entry.sampling,
        entry_id=entry.entry_id,
    )


def _from_word(word: str, number: int) -> Entry:
    try:
        word.encode()
    except UnicodeEncodeError:  # bytes outside the terminal's encoding
        raise RequestError(f"a prompt must be UTF-8 text; got {word!r}. Convert it.") from None
    return Entry(place=f"prompt {number}", prompt=as_prompt(word))


def _standard_input() -> list[Entry]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        return list(_from_lines(sys.stdin, "standard input"))
    except UnicodeDecodeError as error:
        raise _not_text("standard input", error) from None


def _from_file(file: str) -> list[Entry]:
    try:
        with Path(file).open(encoding="utf-8-sig") as lines:
            return list(_from_lines(lines, file))
    except OSError as error:
        raise RequestError(
            f"--file must be a readable file; got {file!r}: {error.strerror}. Check its name."
        ) from None
    except UnicodeDecodeError as error:
        raise _not_text(file, error) from None


def _from_lines(lines: Iterable[str], source: str) -> Iterator[Entry]:
    """One entry for each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        place, line = f"{source}, line {number}", line.rstrip("\r\n")
        if "\0" in line:
            raise RequestError(
                f"prompts must be UTF-8 text; got a NUL character in {place}, as UTF-16 has many. "
                "Convert it: iconv -f UTF-16 -t UTF-8."
            )
        if line.startswith("{"):
            yield _from_json(line, place)
        elif line.strip():
            yield Entry(place=place, prompt=as_prompt(line))


def _from_json(line: str, place: str) -> Entry:
    try:
        return _from_object(json.loads(line), place)
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also integers of many digits
        raise RequestError(
            f"{place}: a line that begins with {{ must be JSON; got {error}. "
            'Write text that begins with { as {"prompt": "{..."}.'
        ) from None


def _from_object(said: dict[str, Any], place: str) -> Entry:
    sampling = settled(
        {key: said[key] for key in said if key in _SAMPLING_KEYS or key in VLLM_ONLY}
    )
    is_chat = "messages" in said
    own = ("messages", *_CHAT_KEYS) if is_chat else _PROMPT_KEYS
    allowed = {"id", *own, *_SAMPLING_KEYS, *VLLM_ONLY}
    for key in said:
        if key not in allowed:
            raise _unknown(key, is_chat)
    SamplingParams(**sampling)  # raises now, with the line's number
    entry_id = said.get("id")
    if isinstance(entry_id, bool) or not isinstance(entry_id, str | int | None):
        raise RequestError(f"an id must be a string or an integer; got id={shown(entry_id)}.")
    if is_chat:
        template_args = {key: said[key] for key in _CHAT_KEYS if key in said}
        return Entry(
            place=place,
            messages=said["messages"],
            template_args=template_args,
            sampling=sampling,
            entry_id=entry_id,
        )
    prompt = as_prompt({key: said[key] for key in _PROMPT_KEYS if key in said})
    return Entry(place=place, prompt=prompt, sampling=sampling, entry_id=entry_id)


def _unknown(key: str, is_chat: bool) -> RequestError:
    if key in _CHAT_KEYS:
        return RequestError(f'"{key}" goes with "messages"; got it without them. Drop it.')
    if key in _PROMPT_KEYS:
        return RequestError(f'a line holds "messages" or a prompt; got both, with "{key}".')
    near = difflib.get_close_matches(key, _KNOWN_KEYS, n=1)
    hint = f'Did you mean "{near[0]}"?' if near else _TAKES
    kind = "messages" if is_chat else "a prompt"
    return RequestError(f"a line with {kind} has no such key; got {shown(key)}. {hint}")


_TAKES = (
    'Lines take "prompt", "prompt_token_ids" or "messages", "id", and the parameters of sampling.'
)


def _not_text(source: str, error: UnicodeDecodeError) -> RequestError:
    if error.object[:2] in _UTF16_MARKS:
        return RequestError(
            f"prompts must be UTF-8 text; got {source} in UTF-16. "
            "Convert it: iconv -f UTF-16 -t UTF-8."
        )
    return RequestError(f"prompts must be UTF-8 text; got {source}: {error.reason}. Convert it.")
