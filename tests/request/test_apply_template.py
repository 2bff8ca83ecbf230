"""The arguments of a chat: defaults, names of templates, and variables."""

from typing import Any

import pytest

from jinfer.errors import RequestError
from jinfer.request.apply_template import apply_template
from jinfer.request.chat import ChatRenderer

_TEMPLATES = {
    "default": "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}!{% endif %}{% endif %}",
    "tool_use": "{{ tools | length }}{{ documents | length }}",
}
_USER = [{"role": "user", "content": "hi"}]
_BEGUN = [*_USER, {"role": "assistant", "content": "So"}]


@pytest.fixture(scope="module")
def renderer():
    with ChatRenderer() as one:
        yield one


@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        (_USER, {}, "<s><user>hi<assistant>"),
        (_USER, {"add_generation_prompt": False}, "<s><user>hi"),
        (_BEGUN, {"continue_final_message": True}, "<s><user>hi<assistant>So"),
        (_USER, {"tools": [{}], "documents": [{}, {}]}, "12"),
        (_USER, {"tools": [{}], "chat_template": "default"}, "<s><user>hi<assistant>"),
        (_USER, {"chat_template": "{{ bos_token }}{{ messages[0].content }}"}, "<s>hi"),
        (_USER, {"chat_template_kwargs": {"thinking": True}}, "<s><user>hi<assistant>!"),
        (_USER, {"chat_template_kwargs": {"bos_token": "<b>"}}, "<b><user>hi<assistant>"),
        # As in vLLM: chat_template_kwargs also gives the other arguments.
        (_USER, {"chat_template_kwargs": {"add_generation_prompt": False}}, "<s><user>hi"),
        (
            _BEGUN,
            {"chat_template_kwargs": {"continue_final_message": True}},
            "<s><user>hi<assistant>So",
        ),
        (_USER, {"chat_template_kwargs": {"tools": [{}], "documents": [{}]}}, "11"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}],
            {"chat_template_content_format": "string"},
            "<s><user>a\nb<assistant>",
        ),
    ],
)
def test_arguments(
    renderer: ChatRenderer, messages: Any, options: dict[str, Any], text: str
) -> None:
    named = {"bos_token": "<s>"}
    assert apply_template(renderer, _TEMPLATES, named, messages, **options) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": "x"}, r"must be one of \['default', 'tool_use'\]; got 'x'"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs must be a dict; got \[1\]"),
        ({"chat_template_kwargs": {1: 2}}, "must name variables of the template, .*; got 1"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "got 'chat_template'. Pass it as an"),
        ({"chat_template_kwargs": {"x": {1, 2}}}, "must be plain JSON values"),
    ],
)
def test_refusals(renderer: ChatRenderer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        apply_template(renderer, _TEMPLATES, {}, _USER, **options)
