"""Parts of a chat that its template ignores: found by rendering the chat with a change."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

_MARK = " (changed)"
_LOG = logging.getLogger("jinfer")


def changed_jobs(job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name of each part of a rendering job, and the job with that part changed.

    If both jobs give the same text, the template ignores the part. Contents get another text
    instead of being removed: a template may refuse a chat without them, or write a default.
    """
    messages = job["messages"]
    for name in ("tools", "documents"):
        if job["variables"][name]:
            yield name, {**job, "variables": {**job["variables"], name: None}}
    for role in dict.fromkeys(message["role"] for message in messages):
        if any(_changed(message, role) != message for message in messages):
            changed = [_changed(message, role) for message in messages]
            yield f"messages of the role {role!r}", {**job, "messages": changed}
    if any(message.get("tool_calls") for message in messages):
        yield "tool_calls", {**job, "messages": _without_calls(messages)}


def warn_unused(what: str) -> None:
    """Logs that the template ignores a part of the chat."""
    _LOG.warning(
        "the chat template ignores %s; the model sees nothing of this. Leave this out, or pass "
        "another chat_template.",
        what,
    )


def _changed(message: dict[str, Any], role: str) -> dict[str, Any]:
    """A message of this role with another text; any other message as it is."""
    content = message.get("content")
    if message["role"] != role or not content:
        return message
    if isinstance(content, str):
        return {**message, "content": content + _MARK}
    return {
        **message,
        "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + _MARK}],
    }


def _without_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"content": "", **{key: value for key, value in message.items() if key != "tool_calls"}}
        for message in messages
    ]
