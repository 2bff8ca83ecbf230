"""Output to a terminal, a file and a pipe."""

import io
import sys

import pytest

from jinfer.cli.screen import binary_size, counted, milliseconds, show


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_character_that_the_output_cannot_spell_is_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for encoding, want in (("ascii", rb"a\u20ac\xe9"), ("latin-1", b"a\\u20ac\xe9")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        show("a\u20ac\xe9")
        assert written.getvalue() == want


def test_a_terminal_gets_dimmed_prompts_and_no_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show("prompt", dim=True)
    show(" text\x1b]0;title\x07\n")
    assert screen.getvalue() == "\x1b[2mprompt\x1b[0m text]0;title\n"
    monkeypatch.setenv("NO_COLOR", "1")
    show("plain", dim=True)
    assert screen.getvalue().endswith("\nplain")


def test_a_file_gets_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show("a\x1bb", dim=True)
    assert capsys.readouterr().out == "a\x1bb"


def test_numbers() -> None:
    assert (milliseconds(0.0123), milliseconds(None)) == ("12.3 ms", "-")
    assert (counted(1, "token"), counted(1000, "token")) == ("1 token", "1,000 tokens")
    sizes = [binary_size(count) for count in (5, 2048, 6 << 20, 3 << 40)]
    assert sizes == ["5 bytes", "2.0 KiB", "6.0 MiB", "3,072.00 GiB"]
