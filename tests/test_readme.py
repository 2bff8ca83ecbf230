"""Both READMEs are true: examples run, commands parse, paths exist."""

import re
import shlex
from pathlib import Path

import pytest

from jinfer.cli.arguments import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
README_OF_CODE = (ROOT / "jinfer" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def jinfer_commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("jinfer ")]


@pytest.mark.parametrize("source", blocks("python"))
def test_python_runs(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("Once upon a time ")


def test_there_is_something_to_run() -> None:
    assert len(blocks("python")) >= 1 and len(jinfer_commands()) >= 4


@pytest.mark.parametrize("command", jinfer_commands())
def test_command_is_understood(command: str) -> None:
    assert parse(shlex.split(command)[1:]).command == command.split()[1]


def test_the_map_has_nine_files() -> None:
    nine_files = README_OF_CODE.split("\n## How a request travels\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d) \| `([^`]+)` \|", nine_files, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 10))
    assert [path for _, path in rows if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize(
    ("page", "least"), [(README, 6), (README_OF_CODE, 40)], ids=["users", "code"]
)
def test_every_path_exists(page: str, least: int) -> None:
    # One slash and known roots: not "org/name".
    paths = re.findall(r"`((?:jinfer|tests|notebooks|kernels_pallas|configs)/[\w/.]+)`", page)
    assert len(paths) >= least
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_its_first_command_is_the_one_that_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'jinfer generate "Once upon a time"' in ci and 'pip install -q ".[test]"' in ci
    assert 'pip install . && jinfer generate "Once upon a time"' in blocks("bash")[0]
    assert 'pip install ".[test]" && pytest' in blocks("bash")[1]
