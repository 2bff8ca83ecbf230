"""The command line, run in this process through `main`."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
from fast_compiles import FAST_COMPILES
from random_checkpoint import write_llama_checkpoint

from jinfer import LLM, SamplingParams, __version__
from jinfer.cli import INTERRUPTED, PIPE_CLOSED, main
from jinfer.cli import chat as chat_module
from jinfer.cli import generate as generate_module
from jinfer.cli.arguments import engine_args, parse, sampling_args
from jinfer.cli.chat import Conversation
from jinfer.cli.generate import made_to_measure, summary
from jinfer.cli.prompts import read_prompts
from jinfer.cli.screen import binary_size, counted, milliseconds, show
from jinfer.config import EngineConfig
from jinfer.errors import RequestError
from jinfer.request.output import RequestMetrics
from jinfer.request.prompt import Prompt

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--max-num-seqs", "4", "--max-num-batched-tokens", "16"]


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*argv: str) -> Ran:
        return Ran(main(argv), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_num_seqs=4, max_num_batched_tokens=16, progress=False) as llm:
        yield llm


@pytest.fixture
def one_llm(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands use the module's engine, and leave it open."""

    class Kept:
        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def __enter__(self) -> LLM:
            return llm

        def __exit__(self, *exc_info: object) -> None:
            pass

    monkeypatch.setattr(generate_module, "LLM", Kept)
    monkeypatch.setattr(chat_module, "LLM", Kept)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- words and flags ---


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
        "--engine-seed 8 --dtype float32 --num-pages 70 -q".split()
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
        "progress": False,
    }


def test_a_word_too_many_is_no_flag() -> None:
    with pytest.raises(ValueError, match="jinfer info takes no such word; got b. See `jinfer info"):
        parse(["info", "a", "b"])


def test_what_is_not_written_is_left_to_the_model() -> None:
    args = parse(["chat"])
    assert sampling_args(args) == {}
    assert engine_args(args) == {"progress": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"required: COMMAND\. See `jinfer --help`\."),
        (["serve"], r"invalid choice: 'serve'.*'generate', 'chat', 'info'"),
        (["generate", "A", "--tempratur", "1"], r"got --tempratur\. Did you mean --temperature\?"),
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
        (["bench"], r"required: BENCHMARK"),
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
def test_bad_input_is_one_line(run: Callable[..., Ran], words: list[str], message: str) -> None:
    status, out, err = run(*words)
    assert status == 2 and out == ""
    assert re.fullmatch(rf"jinfer: error: .*{message}.*\n", err)


def test_interrupt_ends_with_130(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(words: object, file: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "read_prompts", interrupted)
    assert run("generate", "A") == (INTERRUPTED, "", "\njinfer: interrupted\n")
    assert INTERRUPTED == 130


def test_a_warning_is_one_line(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(words: object, file: object) -> list[Prompt]:
        warnings.simplefilter("always")  # the test suite turns warnings into errors
        warnings.warn("mind this", stacklevel=1)
        raise RequestError("and stop.")

    monkeypatch.setattr(generate_module, "read_prompts", warned)
    said = "jinfer: warning: mind this\njinfer: error: and stop.\n"
    assert run("generate", "A") == (2, "", said)


def test_a_platform_that_is_not_here(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
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


# --- prompts ---


def test_prompts_from_words_and_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('one\n\n{"prompt": "two\\nlines"}\n{"prompt_token_ids": [1, 2]}\n  three \n')
    prompts = read_prompts(["zero"], str(file))
    assert [p.text for p in prompts] == ["zero", "one", "two\nlines", None, "  three "]
    assert prompts[3].token_ids == (1, 2)


@pytest.mark.parametrize("words", [[], ["-"]])
def test_prompts_from_standard_input(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\ntwo"))
    assert [p.text for p in read_prompts(words, None)] == ["one", "two"]


def test_standard_input_is_utf8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("große\n".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert [p.text for p in read_prompts([], None)] == ["große"]
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
        (b"ok\n{not json\n", r"line 2: a line that begins with { must be JSON.*Write text that"),
        (b'{"text": "A"}\n', r'line 1: a prompt dict takes the keys "prompt"'),
        (b"\n \n", r"there must be a prompt; got none in .*prompts"),
        (b"\xff\n", r"prompts must be UTF-8 text; got .*prompts: invalid start byte\. Convert"),
    ],
)
def test_bad_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_prompts([], str(file))


# --- generate ---


def test_generate_starts_an_engine_and_streams(run: Callable[..., Ran]) -> None:
    words = ["generate", "Once upon a time", "--max-tokens", "6", "--temperature", "0", *SMALL]
    status, out, err = run(*words)
    assert status == 0
    assert re.fullmatch(r"Once upon a time[^\n].+\n", out, flags=re.DOTALL)
    last = err.rstrip("\n").splitlines()[-1]
    number = r"[\d.]+"
    assert re.fullmatch(
        rf"jinfer: 6 tokens in {number} s; TTFT {number} ms, TPOT {number} ms", last
    )
    assert "Warning" not in err
    assert run(*words, "--quiet") == (0, out, "")


@pytest.mark.usefixtures("one_llm")
def test_many_prompts_come_in_order(run: Callable[..., Ran], llm: LLM) -> None:
    prompts = ["The king", "A fox", "In the wood", "One day", "The end", "Long ago"]
    status, out, err = run("generate", *prompts, "--max-tokens", "5", "--temperature", "0")
    want = llm.generate(prompts, SamplingParams(max_tokens=5, temperature=0), use_tqdm=False)
    shown = [f"{output.prompt}{output.outputs[0].text}\n" for output in want]
    assert (status, out) == (0, "\n".join(shown))
    assert re.match(r"jinfer: 6 prompts, \d+ tokens in .* s; median TTFT .*, median TPOT", err)


@pytest.mark.usefixtures("one_llm")
def test_json(run: Callable[..., Ran]) -> None:
    words = ["generate", "The king", "--json", "--max-tokens", "4", "--seed", "1", "--ignore-eos"]
    status, out, _ = run(*words, "--logprobs", "2", "--prompt-logprobs", "1")
    said = json.loads(out)
    assert status == 0
    assert said["prompt"] == "The king" and said["finish_reason"] == "length"
    assert len(said["token_ids"]) == len(said["logprobs"]) == 4
    assert said["logprobs"][0][0].keys() == {"token_id", "logprob", "rank", "decoded_token"}
    assert said["prompt_logprobs"][0] is None
    assert said["metrics"]["num_output_tokens"] == 4
    assert 0 < said["metrics"]["ttft_s"] <= said["metrics"]["e2e_s"]
    several = json.loads(run(*words, "--n", "2").out)
    assert [len(one["token_ids"]) for one in several["outputs"]] == [4, 4]
    assert several["outputs"][0]["text"] == said["text"]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "The king", "--max-tokens", "3", *SMALL],
        ["chat", "--max-tokens", "3", *SMALL],
        ["bench", "serve", *"--num-prompts 2 --input-tokens 8 --output-tokens 3".split(), *SMALL],
        ["bench", "kernels", *"--cases decode_1x1k --implementation xla --repeats 1".split()],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_profile(command: list[str], tmp_path: Path) -> None:
    # In a process of its own: once the TPU compiler has been loaded, JAX cannot trace any more.
    program = ["-c", "import sys; from jinfer.cli import main; sys.exit(main())"]
    words = [*command, "--profile", str(tmp_path / "trace")]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {FAST_COMPILES}"}
    ran = subprocess.run(
        [sys.executable, *program, *words],
        input="Hello.\n",
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.usefixtures("one_llm")
def test_one_bad_prompt_does_not_stop_the_others(run: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt_token_ids": [99999]}\n{"prompt": "The king"}\n')
    status, out, err = run("generate", "--file", str(file), "--json", "--max-tokens", "2")
    bad, good = map(json.loads, out.splitlines())
    assert status == 2
    assert bad["prompt_token_ids"] == [99999] and "got 99999 at position 0" in bad["error"]
    assert good["finish_reason"] == "length"
    assert "jinfer: error: prompt 1: prompt token ids must be in [0, 4096)" in err


@pytest.mark.usefixtures("one_llm")
def test_one_bad_prompt_alone_is_an_error(run: Callable[..., Ran]) -> None:
    for words in ([], ["--json"]):
        status, out, err = run("generate", "The king " * 2000, *words)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"jinfer: error: a prompt must leave room .*\n", err)


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(run: Callable[..., Ran]) -> None:
    status, out, err = run("generate", "")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"jinfer: error: a prompt needs at least one token; got none\. .*\n", err)


def test_an_engine_is_made_to_measure() -> None:
    def sizes(prompts: list[Prompt], *words: str, n: int = 1) -> tuple[int, ...]:
        return tuple(made_to_measure(prompts, n, parse(["generate", *words])).values())

    short, ids = Prompt("Once upon a time", None), Prompt(None, tuple(range(100)))
    assert sizes([short]) == (1, 8)
    assert sizes([short, ids]) == (2, 128)
    assert sizes([short], n=3) == (3, 8)
    assert sizes([Prompt("a" * 10**6, None)]) == (1, 512)
    assert sizes([short], "--prompt-logprobs", "0") == (32, 32)
    assert sizes([short] * 9) == ()
    assert sizes([short], "--max-num-seqs", "2") == ()
    assert sizes([short], "--max-num-batched-tokens", "64") == ()


def test_summary_of_little() -> None:
    metrics = RequestMetrics(arrival_time=1.0, first_token_time=1.5, finished_time=1.5)
    metrics.num_output_tokens = 1
    assert summary([metrics], 0.5) == "1 token in 0.50 s; TTFT 500.0 ms"


# --- chat ---


def test_chat_answers_and_remembers(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["There was a king.", "", "/help", "/nonsense", "He had a son.", "/reset", "A fox."]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, "/quit", "never read"])))
    asked = []
    monkeypatch.setattr(
        llm, "render", lambda messages: asked.append(messages) or LLM.render(llm, messages)
    )
    conversation = Conversation(llm, SamplingParams(max_tokens=4, seed=1), system="Be kind.")
    assert conversation.run() == 0
    out, err = capsys.readouterr()
    roles = [[message["role"][0] for message in messages] for messages in asked[1:]]
    assert roles == [["s", "u"], ["s", "u", "a", "u"], ["s", "u"]]
    assert asked[2][2]["content"] == out.split("\n/reset")[0]
    assert "Ctrl-C stops an answer" in out
    assert "got /nonsense. /help lists them." in err and "is forgotten" in err


def test_interrupt_ends_the_answer_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(llm, SamplingParams(max_tokens=500, seed=1), system=None)
    presses = iter([True])

    def press_once(text: str) -> None:
        if text and next(presses, False):
            raise KeyboardInterrupt
        sys.stdout.write(text)

    monkeypatch.setattr(chat_module, "show", press_once)
    monkeypatch.setattr(sys, "stdin", io.StringIO("There was a king.\n/help\n"))
    assert conversation.run() == 0
    assert capsys.readouterr().out.startswith(" [stopped]\n/reset ")
    while llm.engine.has_work:  # the step in flight
        llm.engine.step()
    assert llm.generate("A", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_interrupt_at_the_prompt_tells_the_way_out(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    presses = iter([KeyboardInterrupt(), EOFError()])

    def no_line(prompt: str) -> str:
        raise next(presses)

    monkeypatch.setattr("builtins.input", no_line)
    assert Conversation(llm, SamplingParams(), system=None).run() == 0
    assert "/quit or Ctrl-D ends the chat" in capsys.readouterr().err


@pytest.mark.usefixtures("one_llm")
def test_a_full_context_does_not_end_the_chat(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "The king " * 2000
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{long}\nA fox.\n"))
    status, out, err = run("chat", "--max-tokens", "3", "--temperature", "0")
    assert status == 0 and out.strip()
    assert err.startswith("jinfer: chat with fable; /help lists the commands\n")
    assert re.search(r"error: a prompt must leave room .* /reset begins anew\.", err)


# --- info ---


def test_info_of_a_checkpoint(run: Callable[..., Ran], tmp_path: Path) -> None:
    folder = write_llama_checkpoint(tmp_path / "model", seed=0, dtype="bfloat16")
    status, out, err = run("info", str(folder))
    assert (status, err) == (0, "")
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert lines["architecture"] == "LlamaForCausalLM (family llama)"
    assert lines["context"] == "256 tokens"
    assert "21 bfloat16" in lines["weights"] and lines["tokenizer"] == "none"
    assert lines["KV cache"].startswith("512 bytes per token in float32")
    said = json.loads(run("info", str(folder), "--json").out)
    assert said["model"] == str(folder) and said["stored_dtypes"] == {"bfloat16": 21}


def test_info_of_the_shipped_model(run: Callable[..., Ran]) -> None:
    out = run("info").out
    assert out.startswith("model         fable\n") and "end tokens    2\n" in out


# --- the screen ---


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
