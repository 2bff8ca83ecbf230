"""Start-up, as far as it goes without a device: the tokenizer beside the model."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from random_checkpoint import write_llama_checkpoint

from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.errors import CheckpointError
from jinfer.shipped import target_folder
from jinfer.startup import load as start
from jinfer.startup.load import _model_folder, _tokenizer_folder, _tokenizer_of
from jinfer.weights.load import read_model_config


@pytest.mark.parametrize(
    ("vocab_size", "lines"),
    [(4096, []), (5000, []), (4000, ["tokenizer has 4,096 tokens, the model only 4,000: text"])],
)
def test_a_vocabulary_that_is_too_small_is_told(vocab_size, lines, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("jinfer"), "propagate", True)
    folder = target_folder()
    model = replace(read_model_config(folder), vocab_size=vocab_size)
    tokenizer = _tokenizer_of(EngineConfig(model=folder), folder, model)
    assert tokenizer is not None and tokenizer.vocab_size == 4096
    assert [want in line for want, line in zip(lines, caplog.messages, strict=True)] == [
        True
    ] * len(lines)
    # Rows of the model that have no text add nothing to an output.
    assert tokenizer.decode([4096, 4999]) == tokenizer.token_text(4096) == ""


class _NotCompiling:
    """Stands for the compilation, whose result `load` waits for after the weights."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> "_NotCompiling":
        return self

    def __exit__(self, *_: object) -> None: ...

    def done(self, *_: object) -> None: ...

    def result(self) -> NoReturn:
        raise InterruptedError("the programs")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_changes_while_it_loads_is_refused(
    name: str, load_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0)
    config = EngineConfig(
        model=folder,
        load_format=load_format,
        skip_tokenizer_init=True,
        num_pages=40,
        progress=False,
    )
    monkeypatch.setattr(start, "Compiling", _NotCompiling)
    with pytest.raises(InterruptedError):  # unchanged: `load` goes on to the programs
        start.load(config)
    make = start._load_weights

    def make_and_touch(*args: Any) -> Any:
        made = make(*args)
        os.utime(folder / name, ns=(0, 0))
        return made

    monkeypatch.setattr(start, "_load_weights", make_and_touch)
    if load_format == "dummy":  # reads no weights, so no two files must belong together
        with pytest.raises(InterruptedError):
            start.load(config)
        return
    with pytest.raises(CheckpointError, match=f"must not change .*{name}', which was written or"):
        start.load(config)


def test_overrides_reach_the_model_and_its_end_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0)
    programs: list[ModelConfig] = []

    def noted(plan: EnginePlan, model: ModelConfig, *_: object) -> list[Any]:
        programs.append(model)
        raise InterruptedError("before compiling")

    monkeypatch.setattr(start, "step_programs", noted)
    config = EngineConfig(model=folder, skip_tokenizer_init=True, num_pages=40, progress=False)
    changed: dict[str, Any] = {"rope_theta": 5e5, "max_position_embeddings": 512}
    for overrides in (None, changed):
        with pytest.raises(InterruptedError):
            start.load(replace(config, hf_overrides=overrides))
    assert programs[1] == replace(programs[0], **changed)
    with pytest.raises(
        CheckpointError, match="end tokens must lie in the vocabulary; got .*=2 wit"
    ):
        start.load(replace(config, load_format="dummy", hf_overrides={"vocab_size": 2}))


def test_without_a_tokenizer_there_is_nothing_to_compare() -> None:
    folder = target_folder()
    config = EngineConfig(model=folder, skip_tokenizer_init=True)
    assert _tokenizer_of(config, folder, read_model_config(folder)) is None


def test_the_hubs_arguments_reach_the_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolved(name: str, **options: object) -> Path:
        asked.append((name, options["revision"], options["download_dir"], options["token"]))
        return tmp_path

    monkeypatch.setattr("jinfer.startup.load.resolve_model", resolved)
    where: dict[str, Any] = {"download_dir": "/data", "hf_token": "secret"}
    config = EngineConfig(model="o/m", revision="v2", **where)
    assert _model_folder(config) == _tokenizer_folder(config, tmp_path) == tmp_path
    assert asked == [("o/m", "v2", "/data", "secret")]  # the tokenizer is in the model's folder
    asked.clear()
    _tokenizer_folder(replace(config, tokenizer_revision="v3"), tmp_path)
    _tokenizer_folder(replace(config, tokenizer="o/t"), tmp_path)
    assert [one[:2] for one in asked] == [("o/m", "v3"), ("o/t", None)]


def test_a_shipped_model_has_no_revisions() -> None:
    with pytest.raises(CheckpointError, match="belongs to a hub name; got revision='v2'"):
        _model_folder(EngineConfig(model="fable", revision="v2"))
