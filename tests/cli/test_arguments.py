"""Words and flags of the command line."""

import argparse
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from jinfer import SamplingParams, __version__
from jinfer.cli import INTERRUPTED, PIPE_CLOSED, main
from jinfer.cli import generate as generate_module
from jinfer.cli.arguments import _parsers, engine_args, parse, sampling_args
from jinfer.cli.flag_defaults import UNSET
from jinfer.config import EngineConfig
from jinfer.errors import RequestError

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., Any]  # of conftest.py


@pytest.mark.smoke
def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"jinfer {__version__}\n"


BENCHMARKS = ("latency", "throughput", "serve", "startup", "kernels")


@pytest.mark.parametrize(
    "words",
    [
        [],
        *([command] for command in ("generate", "chat", "info", "convert", "bench")),
        *(["bench", name] for name in BENCHMARKS),
    ],
    ids=" ".join,
)
def test_help_fits_a_hundred_columns(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("usage: jinfer")


def test_every_parameter_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    flags = set(re.findall(r"--([a-z-]+)", capsys.readouterr().out))
    flags = {flag.removeprefix("no-").replace("-", "_") for flag in flags}
    renamed = {"progress": "quiet"}
    for kind in (SamplingParams, EngineConfig):
        names = {renamed.get(f.name, f.name) for f in fields(kind)}
        assert names - {"output_kind"} <= flags  # how a stream is told, which is the command's own
    assert "engine_seed" in flags


def test_flags_become_keywords() -> None:
    args = parse(
        "generate A --temperature 0.5 --stop x --stop y --stop-token-ids 5,6 --stop-token-ids 7 "
        "--logit-bias 3=-1.5 --logit-bias 4=2 --ignore-eos --no-skip-special-tokens --seed 9 "
        '--engine-seed 8 --dtype float32 --num-pages 70 -q --hf-overrides {"rope_theta":5}'.split()
    )
    assert sampling_args(args) == {
        "temperature": 0.5,
        "stop": ["x", "y"],
        "stop_token_ids": [5, 6, 7],
        "logit_bias": {3: -1.5, 4: 2.0},
        "ignore_eos": True,
        "skip_special_tokens": False,
        "seed": 9,
    }
    assert engine_args(args) == {
        "seed": 8,
        "dtype": "float32",
        "num_pages": 70,
        "hf_overrides": {"rope_theta": 5},
        "progress": False,
    }


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        ("A --max-tokens 1 B", ["A", "B"]),
        ("--json A --max-tokens 1 B --stop x -5 - --max-tokens 2", ["A", "B", "-5", "-"]),
        ("A --json -- -B --json -- C", ["A", "-B", "--json", "--", "C"]),
        ("-- -A", ["-A"]),
        ("--json", []),
    ],
)
def test_prompts_may_stand_anywhere(words: str, prompts: list[str]) -> None:
    assert parse(["generate", *words.split()]).prompts == prompts


def test_a_word_too_many_is_no_flag() -> None:
    with pytest.raises(ValueError, match="jinfer info takes no such word; got b. See `jinfer info"):
        parse(["info", "a", "b"])


def test_what_is_not_written_is_left_to_the_model() -> None:
    args = parse(["chat"])
    assert sampling_args(args) == {}
    assert engine_args(args) == {"progress": True}


@pytest.mark.parametrize("words", [[], ["bench"]], ids=" ".join)
def test_no_command_prints_the_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert out.startswith(" ".join(["usage: jinfer", *words])) and "--help" in out


def test_python_m_jinfer() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "jinfer", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert (ran.returncode, ran.stdout) == (0, f"jinfer {__version__}\n")


@pytest.mark.parametrize("command", [["generate"], ["chat"], *(["bench", n] for n in BENCHMARKS)])
def test_every_flag_with_a_value_tells_its_default(command: list[str]) -> None:
    flags = [action for action in _parser(command)._actions if action.nargs != 0]
    named = [flag for flag in flags if flag.option_strings]
    assert [f.option_strings for f in named if "default" not in (f.help or "")] == []


def _parser(command: list[str]) -> argparse.ArgumentParser:
    _, commands = _parsers()
    return commands[" ".join(command)]


def test_the_words_for_none_are_those_of_fields_that_may_be_none() -> None:
    every = [field for kind in (EngineConfig, SamplingParams) for field in fields(kind)]
    own = {"max_tokens", "enforce_eager"}  # a default of each command; a flag without a value
    assert set(UNSET) | own == {field.name for field in every if field.default is None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve"], r"invalid choice: 'serve'.*'generate', 'chat', 'info'"),
        (["generate", "A", "--tempratur", "1"], r"got --tempratur\. Did you mean --temperature\?"),
        (["generate", "A", "--tempratur", "1", "B"], r"got --tempratur\. Did you mean --temp"),
        (["generate", "A", "--hf-overrides", "x"], r"JSON; got 'x'. .*'{\"rope_theta\": 1000000"),
        (["chat", "--qqqqqq"], r"got --qqqqqq\. See `jinfer chat --help`\."),
        (["generate", "A", "--top-k", "x"], r"--top-k: invalid int value: 'x'"),
        (["generate", "A", "--temperature", "-1"], r"temperature must be in .* Choose a value"),
        (["generate", "A", "--stop-token-ids", "1,b"], r"got '1,b'. Write them as 5,17"),
        (["generate", "A", "--logit-bias", "4"], r"got '4'. Write it as 17=-2\.5"),
        (["generate", "A", "--logprobs", "1"], r"--logprobs is shown by --json only.* Add it\."),
        (["generate", "A", "--no-detokenize"], r"--no-detokenize is shown by --json only"),
        (["generate", "--file", "/no/such"], r"--file must be a readable file; got '/no/such'"),
        (["generate", "A\udcff"], r"a prompt must be UTF-8 text; got 'A\\udcff'\. Convert it\."),
        (["generate", "A", "--model", "/no/such"], r"got model='/no/such'.*Give the folder"),
        (["generate", "A", "-q", "--max-model-len", "99999"], r"max_model_len=99999.*Lower it\."),
        (["chat", "--top-p", "0"], r"top_p must be in \(0, 1\]"),
        (["info", "/no/such"], r"got model='/no/such'"),
        (["convert", "/no/such", "new"], r"got model='/no/such'"),
        (["convert", "fable"], r"arguments are required: ORBAX_FOLDER"),
        (["convert", "fable", "gs://b/x"], r"got the URL 'gs://b/x'\. Convert to a local folder"),
        (["bench", "-q"], r"no such flag; got -q. See `jinfer bench --help`"),
        (["-x"], r"no such flag; got -x. See `jinfer --help`"),
        (["bench", "kernels", "--target", "v3"], r"--target must be one of v4, .*got 'v3'"),
        (["bench", "kernels", "--target", "t4", "l4"], r"one GPU architecture at a time.*t4, l4"),
        (["bench", "kernels", "--cases", "encode"], r"--cases must match .*got 'encode'"),
        (["bench", "kernels", "--implementation", "a"], r"--implementation must be .*got 'a'"),
        (["bench", "kernels", "--dtype", "int4"], r"--dtype must be one of .*got 'int4'"),
        (["bench", "kernels", "--repeats", "0"], r"an integer of at least 1; got '0'"),
        (["bench", "kernels", "--json", "/no/such/file"], r"can be written; got '/no/such/file'"),
        (["bench", "kernels", "--page-sise", "8"], r"got --page-sise\. Did you mean --page-size\?"),
    ],
)
def test_bad_input_is_one_line(run: Run, words: list[str], message: str) -> None:
    status, out, err = run(*words)
    assert status == 2 and out == ""
    assert re.fullmatch(rf"jinfer: error: .*{message}.*\n", err)


def test_interrupt_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "read_prompts", interrupted)
    assert run("generate", "A") == (INTERRUPTED, "", "\njinfer: interrupted\n")
    assert INTERRUPTED == 130


def test_a_warning_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_: object, **__: object) -> None:
        warnings.simplefilter("always")  # the test suite turns warnings into errors
        warnings.warn("mind this", stacklevel=1)
        raise RequestError("and stop.")

    monkeypatch.setattr(generate_module, "read_prompts", warned)
    said = "jinfer: warning: mind this\njinfer: error: and stop.\n"
    assert run("generate", "A") == (2, "", said)


def test_a_platform_that_is_not_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: object, **engine_args: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(generate_module, "LLM", failing)
    message = "Unable to initialize backend 'tpu': none found"
    assert run("generate", "A") == (2, "", f"jinfer: error: {message}\n")
    message = "a bug"
    with pytest.raises(RuntimeError, match="a bug"):  # whoever reports it needs the traceback
        run("generate", "A")


def test_closed_pipe_ends_quietly() -> None:
    program = "import sys; sys.stdin.read(); from jinfer.cli import main; sys.exit(main(['info']))"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()  # only now it goes on, and nobody reads
    complaint = process.stderr.read()
    process.stderr.close()
    assert process.wait() == PIPE_CLOSED
    assert complaint == b""
