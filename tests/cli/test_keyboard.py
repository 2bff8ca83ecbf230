"""Messages of one line and of several."""

import io
import sys

import pytest

from jinfer.cli.keyboard import MARK, prepare_input, read_message


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def messages(text: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    read = []
    try:
        while True:
            read.append(read_message())
    except EOFError:
        return read


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("one\n\n two \n", ["one", "", "two"]),
        ("a \\\n  b\\\nc\nd\n", ["a \n  b\nc", "d"]),
        ("a\\\n", ["a"]),
        ('"""\na\n\n  b\\\n"""\nc\n', ["a\n\n  b\\", "c"]),
        ('"""a\nb"""\n"""c"""\n', ["a\nb", "c"]),
        ('"""a\nb\n', ["a\nb"]),
        ('a """ b\n', ['a """ b']),
    ],
)
def test_messages(text: str, want: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert messages(text, monkeypatch) == want


def test_the_mark_goes_to_the_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    messages("hi\n", monkeypatch)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stdin", Terminal("hi\n"))
    assert read_message() == "hi"  # standard output is a pipe
    assert capsys.readouterr() == ("", MARK)


def test_bytes_that_are_not_utf8_stay_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\nb\xff\nc\n"), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    prepare_input()
    assert [read_message() for _ in range(3)] == ["a", "b\udcff", "c"]
