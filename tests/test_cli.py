"""The command line, run in this process through `main`."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fast_compiles import FAST_COMPILES

from jinfer import LLM, SamplingParams
from jinfer.cli import chat as chat_module
from jinfer.cli import generate as generate_module
from jinfer.cli import main
from jinfer.cli.chat import Conversation
from jinfer.errors import NaNLogitsError
from jinfer.request.output import RequestOutput

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
    with LLM(max_num_seqs=4, max_num_batched_tokens=32, progress=False) as llm:
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


# --- generate ---


def test_generate_starts_an_engine_and_streams(run: Callable[..., Ran]) -> None:
    words = ["generate", "Once upon a time", "--max-tokens", "6", "--temperature", "0", *SMALL]
    status, out, err = run(*words)
    assert status == 0
    assert re.fullmatch(r"Once upon a time[^\n].+\n", out, flags=re.DOTALL)
    last = err.rstrip("\n").splitlines()[-1]
    number = r"[\d.,]+"
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
    cut, last = err.splitlines()
    assert cut == "jinfer: 6 of 6 outputs were cut at the limit; raise --max-tokens (now 5)"
    assert re.match(r"jinfer: 6 prompts, \d+ tokens in .* s; median TTFT .*, median TPOT", last)


@pytest.mark.usefixtures("one_llm")
def test_outputs_of_one_prompt_are_numbered(run: Callable[..., Ran]) -> None:
    words = ["--max-tokens", "2", "--seed", "1", "--n", "2", "-q"]
    out = run("generate", "The king", *words).out
    assert re.fullmatch(r"\[1\] The king[^[]+\n\n\[2\] The king[^[]+\n", out)
    out = run("generate", "The king", "A fox", *words).out
    assert re.findall(r"^\[.*?\] \w+", out, flags=re.MULTILINE) == [
        "[1.1] The",
        "[1.2] The",
        "[2.1] A",
        "[2.2] A",
    ]


@pytest.mark.usefixtures("one_llm")
def test_lines_have_ids_and_settings_of_their_own(
    run: Callable[..., Ran], llm: LLM, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Tell me of a king."}]
    lines = [
        {"prompt": "The king", "id": "a", "max_tokens": 3},
        {"messages": messages, "id": 2, "temperature": 0},
        {"messages": [{"role": "user"}], "id": 3},
        {"prompt": "A fox"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    words = ["--json", "--max-tokens", "5", "--ignore-eos", "--seed", "4"]
    status, out, err = run("generate", "--file", str(file), *words)
    first, chat, bad, last = map(json.loads, out.splitlines())
    assert status == 2 and first["id"] == "a" and "id" not in last
    assert [len(each["token_ids"]) for each in (first, chat, last)] == [3, 5, 5]
    assert (chat["id"], chat["messages"]) == (2, messages)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    [want] = llm.chat(messages, params, use_tqdm=False)
    assert (chat["prompt"], chat["text"]) == (want.prompt, want.outputs[0].text)
    assert bad.keys() == {"id", "messages", "error"} and "needs content" in bad["error"]
    assert f"jinfer: error: {file}, line 3: messages[0] needs content" in err


@pytest.mark.usefixtures("one_llm")
def test_chat_of_one_prompt_prints_the_answer_alone(run: Callable[..., Ran], llm: LLM) -> None:
    words = ["--chat", "--max-tokens", "4", "--temperature", "0"]
    params = SamplingParams(temperature=0, max_tokens=4)
    [want] = llm.chat([{"role": "user", "content": "A king."}], params, use_tqdm=False)
    status, out, err = run("generate", "A king.", *words)
    assert (status, out) == (0, want.outputs[0].text + "\n")
    assert "jinfer: the output was cut at the limit; raise --max-tokens (now 4)" in err
    out = run("generate", "A king.", "A king.", *words).out
    assert out == "\n".join([f"A king.\n{want.outputs[0].text}\n"] * 2)


@pytest.mark.usefixtures("one_llm")
def test_a_model_with_a_chat_template_is_told_of_chat(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["A king.", "--max-tokens", "1"]
    hint = "jinfer: this model has a chat template; with --chat each prompt is a message to it"
    assert hint not in run("generate", *words).err  # the shipped models continue stories
    monkeypatch.setattr(generate_module, "find_shipped", lambda name: None)
    assert run("generate", "B", *words).err.splitlines().count(hint) == 1
    assert hint not in run("generate", *words, "--chat").err
    assert hint not in run("generate", *words, "-q").err


@pytest.mark.usefixtures("one_llm")
def test_a_failed_request_is_a_line_with_its_error(
    run: Callable[..., Ran], llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_completed = llm.as_completed

    def one_fails(*args: Any, **keywords: Any) -> Iterator[tuple[int, RequestOutput]]:
        for place, output in as_completed(*args, **keywords):
            yield place, replace(output, error=RuntimeError("NaN")) if place == 0 else output

    monkeypatch.setattr(llm, "as_completed", one_fails)
    status, out, err = run("generate", "A", "B", "--json", "--max-tokens", "2", "--ignore-eos")
    failed, good = map(json.loads, out.splitlines())
    assert status == 2 and failed == {"prompt": "A", "error": "NaN"}
    assert len(good["token_ids"]) == 2 and "error: prompt 1: NaN" in err


@pytest.mark.usefixtures("one_llm")
def test_a_stream_that_fails_ends_its_line_before_the_error(
    run: Callable[..., Ran], llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(prompt: Any, params: Any) -> Iterator[RequestOutput]:
        yield next(LLM.stream(llm, prompt, params))
        raise NaNLogitsError("the logits are NaN.")

    monkeypatch.setattr(llm, "stream", fails)
    file = tmp_path / "prompts"
    file.write_text("\nThe king")
    status, out, err = run("generate", "--file", str(file), "--max-tokens", "2", "-q")
    assert (status, out.count("\n"), out[-1]) == (2, 1, "\n")
    assert err == f"jinfer: error: {file}, line 2: the logits are NaN.\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("The king\n"))
    status, out, err = run("chat", "--max-tokens", "2", "--ignore-eos", "-q")
    assert (status, out.count("\n"), out[-1]) == (0, 1, "\n")
    assert err == "jinfer: error: the logits are NaN. /reset begins anew.\n"


@pytest.mark.usefixtures("one_llm")
def test_a_character_that_the_output_cannot_spell_costs_no_answer(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoding in ("ascii", "utf-8"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "\\ud800"}\n\U0001f600\nA\n'))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        assert main(["generate", "--json", "--max-tokens", "2"]) == 2
        bad, *good = map(json.loads, written.getvalue().decode(encoding).splitlines())
        assert "must be valid Unicode" in bad["error"]
        assert [line["prompt"] for line in good] == ["\U0001f600", "A"]


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
    assert f"jinfer: error: {file}, line 1: prompt token ids must be in [0, 4096)" in err


@pytest.mark.usefixtures("one_llm")
def test_one_bad_prompt_alone_is_an_error(run: Callable[..., Ran], tmp_path: Path) -> None:
    long = "The king " * 2000
    status, out, err = run("generate", long)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"jinfer: error: a prompt must leave room .*\n", err)
    status, out, err = run("generate", long, "--json")
    assert status == 2 and "must leave room" in json.loads(out)["error"]
    assert re.fullmatch(r"jinfer: error: prompt 1: a prompt must leave room .*\n", err)
    file = tmp_path / "prompts"
    file.write_text(f"\n{long}")
    assert run("generate", "--file", str(file)).err.startswith(f"jinfer: error: {file}, line 2: a ")


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
    out, err = capsys.readouterr()
    assert out.startswith("\n/reset ") and err == "jinfer: stopped\n"
    while llm.engine.has_work:  # the step in flight
        llm.engine.step()
    assert llm.generate("A", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_interrupt_at_the_prompt_tells_the_way_out(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    presses = iter([KeyboardInterrupt(), EOFError()])

    def no_line(prompt: str = "") -> str:
        raise next(presses)

    monkeypatch.setattr("builtins.input", no_line)
    assert Conversation(llm, SamplingParams(), system=None).run() == 0
    assert "/quit or Ctrl-D ends the chat" in capsys.readouterr().err


@pytest.mark.usefixtures("one_llm")
def test_a_message_that_is_too_long_does_not_end_the_chat(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "The king " * 2000
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{long}\nA fox.\n"))
    status, out, err = run("chat", "--max-tokens", "3", "--temperature", "0", "--ignore-eos")
    assert status == 0 and out.strip()
    greeting, how, refused, cut = err.splitlines()
    assert greeting == "jinfer: chat with fable; /help lists the commands"
    assert how.startswith("jinfer: for several lines paste them, end a line with \\, or ")
    assert re.search(r"error: a message must leave room .* Shorten it\.", refused)
    assert cut == "jinfer: the answer was cut after 3 tokens; raise --max-tokens"


def test_a_full_context_goes_on_from_the_last_turns(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turn = "The king was old. " * 45  # about 230 of the context's 1,024 tokens
    lines = [*[turn] * 5, "/last", "/last 2", "/home/user is a path."]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    sent = []
    monkeypatch.setattr(
        llm, "stream", lambda prompt, params: sent.append(prompt) or LLM.stream(llm, prompt, params)
    )
    conversation = Conversation(llm, SamplingParams(max_tokens=2, temperature=0), system="Be kind.")
    assert conversation.run() == 0
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if "cut after" not in line]
    assert said == [
        "jinfer: the context of 1,024 tokens is full: /last 2 answers with the last 2 turns alone, "
        "/reset begins anew",
        "jinfer: /last takes a number of turns from 1 on; got ''. Write /last 2.",
        "jinfer: going on from the last 2 turns",
    ]
    assert [prompt.text.count(turn.strip()) for prompt in sent] == [1, 2, 3, 4, 3, 3]
    assert all("Be kind." in prompt.text for prompt in sent)
    assert len(out.splitlines()) == 6
