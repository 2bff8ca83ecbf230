"""Checks the messages of a chat, and gives templates the names and types that they read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinfer.errors import RequestError, shown

# Each template reads its own name for the text of an assistant's thinking.
_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Checks the messages; returns copies without None values, as templates expect them.

    A message's reasoning gets all three names that templates read. Arguments of tool calls that are
    JSON text are parsed, and empty ones become {}: templates write them as JSON themselves.

    Raises:
      RequestError: a message is malformed; names it and the error.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages must be a list of dicts; got {messages!r:.60}. "
            'Pass [{"role": "user", "content": "..."}].'
        )
    if not messages:
        raise RequestError("messages must hold at least one message; got none. Add one.")
    return [_checked_message(i, message) for i, message in enumerate(messages)]


def with_text_arguments(
    checked: Sequence[dict[str, Any]], given: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """The checked messages with the tool calls as given; None if no arguments were text.

    For templates that add a call's arguments to a string, such as DeepSeek-R1's.
    """
    messages, differs = [], False
    for ours, theirs in zip(checked, given, strict=True):
        calls = theirs.get("tool_calls")
        if ours.get("role") == "assistant" and ours.get("tool_calls") and calls:
            differs |= any(isinstance(_arguments(call), str) for call in calls)
            ours = {**ours, "tool_calls": calls}
        messages.append(ours)
    return messages if differs else None


def _checked_message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be a dict with role and content; got {message!r:.60}.")
    # APIs write None for "absent"; templates test for presence.
    kept = {key: value for key, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str) or not kept["role"]:
        raise RequestError(
            f"{where} needs a role; got role={message.get('role')!r:.60}. "
            'Use "system", "user", "assistant" or "tool".'
        )
    if "content" not in kept and "tool_calls" not in kept:
        raise RequestError(f"{where} needs content; got only {sorted(kept)}. Add some text.")
    if "content" in kept:
        kept["content"] = _checked_content(where, kept["content"])
    reasoning = next((kept[name] for name in _REASONING_NAMES if name in kept), None)
    if reasoning is not None:
        kept = {**dict.fromkeys(_REASONING_NAMES, reasoning), **kept}
    if kept["role"] == "assistant" and "tool_calls" in kept:
        kept["tool_calls"] = _checked_calls(where, kept["tool_calls"])
        if not kept["tool_calls"] and "content" in kept:
            del kept["tool_calls"]  # a template may test for the key alone
    return kept


def _checked_content(where: str, content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise RequestError(
            f"{where} must have text as its content; got content={content!r:.60}. Pass a string."
        )
    return [_checked_part(f"{where} part {i}", part) for i, part in enumerate(content)]


def _checked_part(where: str, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise RequestError(
            f'{where} must be of type "text"; got {kind!r:.60}. Leave other parts out: '
            "these models read text only."
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where} needs text; got text={part.get('text')!r:.60}. Add it.")
    return dict(part)


def _checked_calls(where: str, calls: Any) -> list[Any]:
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise RequestError(f"{where} must have a list as its tool_calls; got {shown(calls)}.")
    checked = []
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise RequestError(
                f"{where} tool_calls[{index}] must be a dict; got {shown(call)}. "
                'Pass {"type": "function", "function": {"name": ..., "arguments": {...}}}.'
            )
        checked.append(_with_parsed_arguments(f"{where} tool_calls[{index}]", dict(call)))
    return checked


def _with_parsed_arguments(where: str, call: dict[str, Any]) -> dict[str, Any]:
    """The call with its arguments as a value; some templates read them beside the name."""
    holder = call["function"] if isinstance(call.get("function"), Mapping) else call
    if holder is call and "arguments" not in call:
        return call
    given = holder.get("arguments")
    arguments = {} if given is None or given == "" else given
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RequestError(
                f"{where} must have a dict or JSON text as its arguments; got {shown(given)}: "
                f"{error!s:.80}. Pass a dict."
            ) from None
    if holder is call:
        return {**call, "arguments": arguments}
    return {**call, "function": {**holder, "arguments": arguments}}


def _arguments(call: Any) -> Any:
    holder = call.get("function") if isinstance(call.get("function"), Mapping) else call
    return holder.get("arguments")
