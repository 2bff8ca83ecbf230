"""Messages of a chat: refusals are in test_chat.py, with the renderer that every user meets."""

import pytest

from jinfer.errors import RequestError
from jinfer.request.messages import check_messages


def test_none_values_are_absent() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "name": None}
    assert check_messages([call]) == [{"role": "assistant", "tool_calls": [{"id": "1"}]}]


def test_the_caller_keeps_their_messages() -> None:
    function = {"name": "f", "arguments": "{}"}
    message = {"role": "assistant", "reasoning": "r", "tool_calls": [{"function": function}]}
    (checked,) = check_messages([message])
    assert checked["tool_calls"] == [{"function": {"name": "f", "arguments": {}}}]
    assert function == {"name": "f", "arguments": "{}"} and set(message) == {
        "role",
        "reasoning",
        "tool_calls",
    }


def test_empty_tool_calls_leave_a_message_with_content() -> None:
    message = {"role": "assistant", "content": "a", "tool_calls": []}
    assert check_messages([message]) == [{"role": "assistant", "content": "a"}]


def test_arguments_beside_the_name() -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    (checked,) = check_messages([{"role": "assistant", "tool_calls": [call]}])
    assert checked["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]


def test_a_role_other_than_the_assistant_keeps_its_calls() -> None:
    message = {"role": "log", "content": "x", "tool_calls": "as it was"}
    assert check_messages([message]) == [message]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([{"function": {"arguments": "{a: 1}"}}], r"got '\{a: 1\}': Expecting .*Pass a dict"),
        ([{"function": {"arguments": "[" * 100_000}}], "or JSON text as its arguments; got"),
        (["f"], r"messages\[0\] tool_calls\[0\] must be a dict; got 'f'"),
        ("f", r"messages\[0\] must have a list as its tool_calls; got 'f'"),
        ({"function": {}}, "must have a list as its tool_calls"),
    ],
)
def test_malformed_calls(calls: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_messages([{"role": "assistant", "tool_calls": calls}])
