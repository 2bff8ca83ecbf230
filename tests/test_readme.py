"""Both READMEs are true: examples run, commands parse, paths exist."""

import re
import shlex
from pathlib import Path

import pytest

from jinfer.cli.arguments import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MACHINES = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
README_OF_CODE = (ROOT / "jinfer" / "README.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def jinfer_commands(page: str = README) -> list[str]:
    """The commands in the page's shell blocks, also those that another command runs."""
    text = "\n".join(blocks("bash", page)).replace("\\\n", " ")
    parts = re.split(r"&&|[\n']", text)
    found = [re.match(r"(?:srun |~/venv/bin/)?(jinfer .*)", part.strip()) for part in parts]
    return [one[1].split(" > ")[0] for one in found if one]


@pytest.mark.parametrize("source", blocks("python"))
def test_python_runs(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("Once upon a time ")


def test_there_is_something_to_run() -> None:
    assert len(blocks("python")) >= 1 and len(jinfer_commands()) >= 4


@pytest.mark.parametrize("command", jinfer_commands())
def test_command_is_understood(command: str) -> None:
    assert parse(shlex.split(command)[1:]).command == command.split()[1]


def test_the_commands_for_machines_are_understood() -> None:
    commands = [one.replace("~/jinfer/", "") for one in jinfer_commands(MACHINES)]
    assert len(commands) >= 4
    for command in commands:
        args = parse(
            [str(ROOT / word) if ".yaml" in word else word for word in shlex.split(command)][1:]
        )
        assert args.command == "generate"


def test_each_configuration_is_on_the_page_of_machines() -> None:
    files = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert set(re.findall(r"^\| `([\w-]+\.yaml)` \| [^`|]+ \|", MACHINES, re.MULTILINE)) == files


def test_users_of_vllm_read_the_differences() -> None:
    told = README.split("Names and meanings are vLLM's")[1].split("`LLM`\nalso has")[0]
    for name in ("max_tokens", "gpu_memory_utilization", "max_model_len", "dtype"):
        assert f"`{name}" in told


def test_the_map_has_nine_files() -> None:
    nine_files = README_OF_CODE.split("\n## How a request travels\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d) \| `([^`]+)` \|", nine_files, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 10))
    assert [path for _, path in rows if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize(
    ("page", "least"),
    [(README, 10), (README_OF_CODE, 40)],
    ids=["users", "code"],
)
def test_every_path_exists(page: str, least: int) -> None:
    # One slash and known roots: not "org/name".
    paths = re.findall(r"`((?:jinfer|tests|notebooks|kernels_pallas|configs|docs)/[\w/.]+)`", page)
    assert len(paths) >= least
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_its_first_command_is_the_one_that_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'jinfer generate "Once upon a time"' in ci and 'pip install -q ".[test]"' in ci
    assert 'pip install . && jinfer generate "Once upon a time"' in blocks("bash")[0]
    assert 'pip install ".[test]" && pytest' in blocks("bash")[1]


@pytest.mark.parametrize("page", ["README.md", "configs/README.md", "docs/from_vllm.md"])
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_imports_for_users_of_vllm_work() -> None:
    page = (ROOT / "docs" / "from_vllm.md").read_text(encoding="utf-8")
    [imports] = blocks("python", page)
    exec(imports, {})
