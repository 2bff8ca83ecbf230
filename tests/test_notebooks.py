"""Every notebook runs from top to bottom, and is stored with the outputs of such a run."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from fast_compiles import FAST_COMPILES
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed_by(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells printed; nothing went to standard error, which is shown in red."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    for output in outputs:
        assert output.output_type == "stream" and output.name == "stdout", output
    return "".join(output.text for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_with_the_outputs_of_one_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run it: jupyter execute --inplace"
    printed = printed_by(notebook)
    assert "TTFT" in printed
    for own in (str(Path.home()), str(ROOT), "Traceback"):  # of the machine that ran it
        assert own not in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_badge_opens_this_notebook(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0].source
    badge = re.search(r"\(https://colab\.research\.google\.com/github/([^)]*)\)", first)
    assert badge is not None
    repository, _, place = badge[1].partition("/blob/main/")
    assert place == path.relative_to(ROOT).as_posix()
    assert f"https://github.com/{repository}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the package of this checkout
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {FAST_COMPILES}")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()  # raises at the first cell that fails
    printed = printed_by(notebook)
    assert "TTFT" in printed and "Warning" not in printed, printed


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
