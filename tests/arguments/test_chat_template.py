"""One argument for three things: a file, a template, a name."""

from pathlib import Path

import pytest

from jinfer.arguments.chat_template import read_chat_template


def test_a_template_is_itself() -> None:
    assert read_chat_template("{{ messages[0].content }}/x.jinja") == (
        "{{ messages[0].content }}/x.jinja"
    )


def test_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    assert read_chat_template(tmp_path / "chat.jinja") == "{{ 'é' }}"
    assert read_chat_template(str(tmp_path / "chat.jinja")) == "{{ 'é' }}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_text("hello")
    assert read_chat_template("plain") == "hello"


def test_other_text_is_a_name() -> None:
    assert read_chat_template("tool_use") == "tool_use"
    assert read_chat_template(None) is None


@pytest.mark.parametrize("name", ["absent.jinja", "folder/absent", Path("absent")])
def test_an_absent_file_is_told(name: str | Path) -> None:
    with pytest.raises(ValueError, match=r"chat_template='.*absent.*' \(No such file.*Correct the"):
        read_chat_template(name)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_chat_template(tmp_path / "chat.jinja")
