"""Parts of a chat that a template ignores are told once, by rendering."""

import logging

import pytest

from jinfer.errors import RequestError
from jinfer.request import chat
from jinfer.request.chat import ChatRenderer

_ALL = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
_NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
_TOOL_CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
]
_TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture(scope="module")
def renderer():
    with ChatRenderer() as one:
        yield one


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "jinfer"):
        logger = logging.getLogger("jinfer")
        logger.addHandler(caplog.handler)  # also where the logger does not propagate
        yield caplog
        logger.removeHandler(caplog.handler)


def _told(lines: pytest.LogCaptureFixture) -> list[str]:
    texts = {record.getMessage() for record in lines.records}
    lines.clear()
    return sorted(text.removeprefix("the chat template ignores ").split(";")[0] for text in texts)


@pytest.mark.parametrize(
    ("template", "messages", "options", "told"),
    [
        (_ALL, _CHAT, {}, []),
        (_NO_SYSTEM, _CHAT, {}, ["messages of the role 'system'"]),
        # The default text is also what the user says: it is used all the same.
        (
            "{% set s = messages[0].content if messages[0].role == 'system' else 'Be brief.' %}"
            "{{ s }}{{ messages[-1].content }}",
            _CHAT,
            {},
            [],
        ),
        ("x", _CHAT, {}, ["messages of the role 'system'", "messages of the role 'user'"]),
        (_ALL + "!", _CHAT, {"tools": _TOOLS}, ["tools"]),
        (_ALL + "{{ tools | tojson }}", _CHAT, {"tools": _TOOLS}, []),
        # Mentions the name and writes nothing of it.
        (_ALL + "{% if tools %}{% endif %}", _CHAT, {"tools": _TOOLS}, ["tools"]),
        (_ALL + "?", _CHAT, {"documents": [{"text": "t"}]}, ["documents"]),
        (_ALL + "??", _CHAT, {"documents": []}, []),
        (_ALL + "{{ documents }}", _CHAT, {"documents": [{"text": "t"}]}, []),
        (_ALL + ".", _TOOL_CHAT, {}, ["tool_calls"]),
        (_ALL + "{{ messages[1].tool_calls }}", _TOOL_CHAT, {}, []),
        (
            _ALL + "..",
            _CHAT,
            {"variables": {"enable_thinking": True}},
            ["the variable 'enable_thinking' (chat_template_kwargs)"],
        ),
        # The value is the default, so the text is the same; but the template reads it.
        (
            _ALL + "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}",
            _CHAT,
            {"variables": {"enable_thinking": True}},
            [],
        ),
        (_ALL + "...", _CHAT, {"special_tokens": {"bos_token": "<s>"}}, []),
    ],
)
def test_ignored_parts_are_told_once(
    renderer: ChatRenderer, lines, template: str, messages, options, told: list[str]
) -> None:
    first = renderer.render(template, messages, **options)
    assert _told(lines) == told
    assert renderer.render(template, messages, **options) == first
    assert _told(lines) == []


def test_a_check_that_fails_is_no_error_and_no_warning(renderer: ChatRenderer, lines) -> None:
    template = "{{ raise_exception('no') if messages[0].content != 'hi' }}ok"
    assert renderer.render(template, [{"role": "user", "content": "hi"}]) == "ok"
    assert _told(lines) == []


def test_a_check_may_be_larger_than_the_largest_chat(
    renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, template = [{"role": "user", "content": "hi"}], _ALL + "; "
    for limit in range(200, 800):
        monkeypatch.setattr(chat, "MAX_INPUT_BYTES", limit)
        try:
            assert renderer.render(template, messages) == "<user>hi; "
            break
        except RequestError:
            continue
    else:
        pytest.fail("no limit was large enough")


def test_a_list_of_parts_is_checked_too(renderer: ChatRenderer, lines) -> None:
    parts = [{"type": "text", "text": "Be brief."}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": "hi"}]
    assert renderer.render(_NO_SYSTEM + " ", messages) == "hi "
    assert _told(lines) == ["messages of the role 'system'"]
    assert renderer.render(_ALL + " ", messages) == "<system>Be brief.<user>hi "
    assert _told(lines) == []
