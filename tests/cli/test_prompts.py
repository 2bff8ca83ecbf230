"""Prompts from the command line, a file or standard input."""

import io
import json
import sys
from pathlib import Path

import pytest

from jinfer.cli.prompts import Entry, read_prompts
from jinfer.errors import RequestError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def texts(entries: list[Entry]) -> list[str | None]:
    return [entry.prompt and entry.prompt.text for entry in entries]


def test_prompts_from_words_and_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('one\n\n{"prompt": "two\\nlines"}\n{"prompt_token_ids": [1, 2]}\n  three \n')
    prompts = read_prompts(["zero"], str(file))
    assert texts(prompts) == ["zero", "one", "two\nlines", None, "  three "]
    assert prompts[3].prompt and prompts[3].prompt.token_ids == (1, 2)
    assert prompts[0].place == "prompt 1" and prompts[4].place == f"{file}, line 5"


@pytest.mark.parametrize("words", [[], ["-"]])
def test_prompts_from_standard_input(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\ntwo"))
    assert texts(read_prompts(words, None)) == ["one", "two"]


def test_standard_input_is_utf8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("große\n".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert texts(read_prompts([], None)) == ["große"]
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="latin1")
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(RequestError, match=r"must be UTF-8 text; got standard input: .* Convert"):
        read_prompts([], None)


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    with pytest.raises(RequestError, match=r"generate needs a prompt; got none\. Write one"):
        read_prompts([], None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "A", "top_p": 1' + b"0" * 5000 + b"}", r"line 1: .* must be JSON"),
        (b'\n{"prompt": "A", "temprature": 1}\n', r"line 2: .*'temprature'. Did you mean"),
        (b'{"prompt": "A", "output_kind": 1}\n', r"line 1: .* no such key; got 'output_kind'"),
        (b'{"prompt": "A", "temperature": -1}\n', r"line 1: temperature must be in"),
        (b'{"prompt": "A", "seed": "x"}\n', r"line 1: seed must be an integer"),
        (b'{"prompt": "A", "id": [1]}\n', r"line 1: an id must be a string or an integer"),
        (b'{"prompt": "A", "tools": []}\n', r'line 1: "tools" goes with "messages"'),
        (b'{"messages": [], "prompt": "A"}\n', r'line 1: a line holds "messages" or a prompt'),
        ("Once\n".encode("utf-16"), r"UTF-8 text; got .*prompts in UTF-16. .*iconv -f UTF-16"),
        ("Once\n".encode("utf-16-le"), r"got a NUL character in .*, line 1, as UTF-16 has many"),
        (b"ok\n{not json\n", r"line 2: a line that begins with { must be JSON.*Write text that"),
        (b'{"text": "A"}\n', r"line 1: a line with a prompt has no such key; got 'text'"),
        (b"\n \n", r"there must be a prompt; got none in .*prompts"),
        (b"\xff\n", r"prompts must be UTF-8 text; got .*prompts: invalid start byte\. Convert"),
    ],
)
def test_bad_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_prompts([], str(file))


def test_a_byte_order_mark_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'\xef\xbb\xbf{"prompt": "A"}\n{"prompt": "\xef\xbb\xbf"}\n'
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    assert texts(read_prompts([], str(file))) == ["A", "\ufeff"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    assert texts(read_prompts([], None)) == ["A", "\ufeff"]


def test_a_line_takes_vllms_fields_at_values_that_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    fields = {"best_of": 1, "guided_decoding": None, "logits_processors": [], "temperature": 0.5}
    file.write_text(json.dumps({"prompt": "A", **fields}))
    (entry,) = read_prompts([], str(file))
    assert entry.sampling == {"temperature": 0.5}
    file.write_text('{"prompt": "A", "best_of": 3}')
    with pytest.raises(
        RequestError, match="line 1: best_of must be None or 1; got best_of=3. Use n"
    ):
        read_prompts([], str(file))


def test_a_line_has_its_own_settings(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    lines = [
        {"prompt": "A", "id": 7, "temperature": 0.5, "max_tokens": None, "cache_salt": "x"},
        {"messages": messages, "id": "b", "seed": 3, "chat_template_kwargs": {"think": True}},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    plain, chat = read_prompts([], str(file))
    assert plain.prompt and plain.prompt.cache_salt == "x"
    assert (plain.entry_id, plain.sampling) == (7, {"temperature": 0.5, "max_tokens": None})
    assert chat.prompt is None and chat.messages == messages and chat.sampling == {"seed": 3}
    assert (chat.entry_id, chat.template_args) == ("b", {"chat_template_kwargs": {"think": True}})


def test_chat_makes_messages_of_texts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "A", "id": 1, "n": 2, "cache_salt": "x"}\n{"messages": [5]}\n')
    word, line, chat = read_prompts(["hi"], str(file), chat=True)
    assert word.messages == [{"role": "user", "content": "hi"}] and word.template_args == {}
    assert line.messages == [{"role": "user", "content": "A"}] and line.sampling == {"n": 2}
    assert (line.entry_id, line.template_args) == (1, {"cache_salt": "x"})
    assert chat.messages == [5]  # the model's template refuses it, and only this one
    file.write_text('\n{"prompt_token_ids": [5]}\n')
    with pytest.raises(RequestError, match=r"line 2: --chat takes text or messages"):
        read_prompts([], str(file), chat=True)
