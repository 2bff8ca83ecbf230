"""What start-up shows: lines in plain words, and a bar of which nothing remains."""

import logging
import time
from dataclasses import replace

import pytest
from aot_programs import LLAMA_3_8B

from jinfer.compile.programs import CompileReport
from jinfer.config import EngineConfig
from jinfer.startup import progress as progress_module
from jinfer.startup.lines import StartLines
from jinfer.startup.plan import resolve_plan
from jinfer.startup.progress import CompileProgress


def wait_for(caplog: pytest.LogCaptureFixture, text: str) -> None:
    end_s = time.monotonic() + 60
    while text not in caplog.text:
        assert time.monotonic() < end_s, caplog.text
        time.sleep(0.01)


def test_without_a_terminal_lines_tell_the_progress(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jinfer")
    with CompileProgress(3, shown=True, first_s=0.01, line_s=0.05) as progress:
        wait_for(caplog, "getting 3 programs ready")
        progress.done("step")
        wait_for(caplog, "1 of 3 programs are ready, 0 s")
    num_lines = len(caplog.records)
    progress.done("decode")  # a compilation that went on
    time.sleep(0.2)
    assert len(caplog.records) == num_lines


@pytest.mark.parametrize(("shown", "first_s"), [(True, 60.0), (False, 0.0)])
def test_a_quick_start_and_a_quiet_one_show_nothing(
    shown: bool, first_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jinfer")
    with CompileProgress(3, shown=shown, first_s=first_s, line_s=0.01):
        time.sleep(0.1)
    assert not caplog.records


def test_nothing_remains_of_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module.screen(), "isatty", lambda: True)
    with CompileProgress(3, shown=True, first_s=0.0) as progress:
        progress.done("step")
        end_s, shown = time.monotonic() + 60, ""
        while "of 3 programs" not in shown:
            assert time.monotonic() < end_s
            shown += capsys.readouterr().err
    shown += capsys.readouterr().err
    assert "jinfer: compiling, " in shown and "\n" not in shown
    assert shown.split("\r")[-1].strip() == "" and shown.split("\r")[-2].strip() == ""


def test_the_lines_use_words_that_newcomers_know(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "jinfer")
    config = EngineConfig(model="org/name", max_num_seqs=4, num_pages=9, max_model_len=128)
    model = replace(LLAMA_3_8B, num_layers=2)
    plan = resolve_plan(config, model, platform="cpu", free_bytes=1 << 30)
    report = CompileReport(
        elapsed_s=2.0, program_s={"a": 1.0, "b": 1.5}, num_cache_hits=1, num_untraced=1
    )
    lines = StartLines(shown=True)
    lines.plan(config, model, plan)
    lines.weights(None)
    lines.programs(report)
    lines.host_pages(plan, None)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert told[0] == "org/name: 1.5 billion parameters in float32 on CPU"
    assert told[1].startswith("up to 4 requests at once; KV cache of 0.00 GiB for 128 tokens;")
    assert told[1].endswith("; at most 128 per request")
    assert "ready: 1 programs compiled and 1 from the cache, in 2.0 s" in told
    for word in ("untraced", "max_model_len", "unrolled", "bucket", "slots"):
        assert word not in " ".join(told)
    assert "layer loop unrolled" in caplog.text and "longest program: b, 1.5 s" in caplog.text
    caplog.clear()
    quiet = StartLines(shown=False)
    quiet.plan(config, model, plan)
    quiet.programs(report)
    assert not caplog.records
