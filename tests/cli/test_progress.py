"""Progress of many prompts."""

import io
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jinfer.cli import progress as progress_module
from jinfer.cli.progress import LINE_EVERY_S, Progress
from jinfer.request.output import RequestMetrics, RequestOutput

OUTPUT = RequestOutput(
    request_id="",
    prompt="",
    prompt_token_ids=[],
    outputs=[],
    finished=True,
    metrics=RequestMetrics(num_output_tokens=40),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = iter([0.0, 1.0, LINE_EVERY_S, LINE_EVERY_S + 1, 2 * LINE_EVERY_S])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(now_s))
    with Progress(4, shown=True) as progress:
        for _ in range(4):
            progress.count(OUTPUT)
    assert capsys.readouterr().err.splitlines() == [
        "jinfer: 2 of 4 prompts done, 80 tokens, 8 tokens/s",
        "jinfer: 4 of 4 prompts done, 160 tokens, 8 tokens/s",
    ]


def test_a_terminal_has_a_bar_that_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress_module, "_writes_file", lambda: True)
    with Progress(2, shown=True) as progress:
        progress.count(OUTPUT)
        progress.note("error: prompt 1: no.")
        progress.count(replace(OUTPUT))
    written = screen.getvalue()
    assert "prompts:  50%" in written and "\rjinfer: error: prompt 1: no.\n" in written
    assert written.endswith("\r") and written.split("\r")[-2].strip() == ""


def test_a_pipe_may_lead_to_the_terminal_so_there_is_no_bar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    reading, writing = os.pipe()
    for file, has_bar in ((os.fdopen(writing, "w"), False), ((tmp_path / "out").open("w"), True)):
        with file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            with Progress(2, shown=True) as progress:
                progress.count(OUTPUT)
            assert ("prompts: " in screen.getvalue()) == has_bar
    os.close(reading)


def test_hidden_progress_still_has_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, shown=False) as progress:
        progress.count(OUTPUT)
        progress.note("error")
    assert capsys.readouterr().err == "jinfer: error\n"
