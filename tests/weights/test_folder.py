"""A model folder that changes while it is read is refused, with the name of the file."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from random_checkpoint import write_llama_checkpoint

from jinfer.errors import CheckpointError
from jinfer.weights.convert import convert
from jinfer.weights.folder import require_unchanged, states_in
from jinfer.weights.orbax import ORBAX_FOLDER


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: _touch(folder / "config.json"), r"config\.json', which was written or rep"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json', which is gone"),
        (lambda folder: _touch(folder / "model-00002-of-00003.safetensors"), "00002.*was written"),
        (lambda folder: _touch(folder / "model.safetensors.index.json"), "index.*was written"),
        (lambda folder: (folder / "model.safetensors").touch(), r"model\.safetensors', which is n"),
        (lambda folder: _touch(folder / ORBAX_FOLDER / "d" / "0"), "orbax/d/0', which was written"),
    ],
)
def test_a_change_is_named(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0, shards=3)
    (folder / ORBAX_FOLDER / "d").mkdir(parents=True)
    (folder / ORBAX_FOLDER / "d" / "0").touch()
    before = states_in(folder)
    require_unchanged(folder, before)
    change(folder)
    with pytest.raises(CheckpointError, match=f"must not change while it loads; got .*{said}"):
        require_unchanged(folder, before)


def test_files_that_are_not_of_the_model_may_change(tmp_path: Path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0)
    before = states_in(folder)
    (folder / "notes.txt").touch()
    (folder / "trainer_state.json").touch()
    _touch(folder / "generation_config.json")
    require_unchanged(folder, before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_conversion_of_a_folder_that_changes_is_refused(tmp_path: Path, name: str) -> None:
    source = write_llama_checkpoint(tmp_path / "hf", seed=0)
    with pytest.raises(CheckpointError, match=f"must not change .*{name}', which was written or"):
        convert(source, tmp_path / "new", on_saved=lambda _: _touch(source / name))
    assert not (tmp_path / "new").exists()
