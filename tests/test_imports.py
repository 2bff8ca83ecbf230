"""Who may import whom, and that no argument of the engine is decoration."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from jinfer.config import EngineConfig

ROOT = Path(__file__).resolve().parents[1]
# A part of the package imports itself and earlier layers, never its neighbours in a layer.
LAYERS = (
    {"axes", "config", "errors", "log", "shipped"},
    {"arguments", "request", "parallel", "hosts", "compile"},
    {"models", "schedule"},
    {"sampling", "weights"},
    {"step"},
    {"runner"},
    {"startup"},
    {"engine"},
    {"llm", "inputs", "outputs", "sampling_params"},
    {"async_llm", "batch", "bench"},
    {"cli"},
    {"__main__"},
)
LAYER_OF = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def part_of(path: Path) -> str:
    """`jinfer/step/pack.py` and `jinfer/engine/engine.py` belong to "step" and "engine"."""
    return path.relative_to(ROOT / "jinfer").parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(path: Path) -> set[str]:
    """Parts of jinfer that a file imports; names of the package's own front door are none."""
    names = [name.split(".") for name in imported_modules(path)]
    return {name[1] for name in names if name[0] == "jinfer" and name[1:] != ["__version__"]}


@pytest.mark.smoke
@pytest.mark.parametrize(
    "path", source_files("jinfer"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_point_to_earlier_layers(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return  # the front door names what lies behind it, and imports it when asked
    assert part in LAYER_OF, f"give {part!r} its place in LAYERS"
    for other in imported_parts(path) - {part}:
        assert LAYER_OF[other] < LAYER_OF[part], f"{part} imports {other}"


def test_the_rule_sees_a_wrong_import(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("import jinfer.step\nfrom jinfer.llm import LLM\nfrom jinfer import engine\n")
    assert imported_parts(path) == {"step", "llm", "engine"}


def test_kernels_import_nothing_of_jinfer() -> None:
    for path in source_files("kernels_pallas"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert "jinfer" not in roots, path


def test_only_step_compile_and_bench_import_kernels() -> None:
    users = {
        part_of(path)
        for path in source_files("jinfer")
        if any(name.startswith("kernels_pallas") for name in imported_modules(path))
    }
    assert users == {"step", "bench", "compile"}


@pytest.mark.smoke
def test_requests_schedule_and_command_line_need_no_jax() -> None:
    files = [*source_files("jinfer/request"), *source_files("jinfer/schedule")]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    # The worker is a program of its own; its last line runs it.
    modules = [name for name in modules if not name.endswith("chat_worker")]
    program = (
        "import importlib, sys\n"
        f"for name in {[*modules, 'jinfer', 'jinfer.cli']}: importlib.import_module(name)\n"
        "print(sorted({'jax', 'flax'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def test_everything_a_user_may_ask_of_the_engine_is_read() -> None:
    read = set()
    for path in source_files("jinfer"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and _last_name(node.value) == "config":
                read.add(node.attr)
    unread = {field.name for field in fields(EngineConfig)} - read
    assert not unread, f"EngineConfig has fields that nothing reads: {sorted(unread)}"


def _last_name(node: ast.expr) -> str:
    """`config`, `self.config` and `self._config` are all called "config"."""
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name.removeprefix("_")
