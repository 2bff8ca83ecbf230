"""End tokens and sampling defaults, as a checkpoint's two files name them."""

import pytest
from random_checkpoint import write_json

from jinfer.config import GenerationDefaults
from jinfer.errors import CheckpointError
from jinfer.weights.generation_config import read_generation_config


def read(tmp_path, content, hf_config=None):
    write_json(tmp_path / "generation_config.json", content)
    return read_generation_config(tmp_path, hf_config or {})


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        (7, 2, (7,)),
        ([7, 8], 2, (7, 8)),
        (None, 2, (2,)),
        (None, [2, 3], (2, 3)),
        (None, None, ()),
        (0, 2, (0,)),
    ],
)
def test_end_tokens(tmp_path, generation, config, want) -> None:
    got = read(tmp_path, {"eos_token_id": generation}, {"eos_token_id": config})
    assert got.eos_token_ids == want


def test_file_may_be_absent(tmp_path) -> None:
    got = read_generation_config(tmp_path, {"eos_token_id": 2})
    assert got == GenerationDefaults(eos_token_ids=(2,), sampling={})


def test_sampling_holds_only_what_the_file_names(tmp_path) -> None:
    got = read(
        tmp_path,
        {
            "do_sample": False,
            "temperature": 0.6,
            "top_k": 50,
            "top_p": None,
            "repetition_penalty": 1.05,
            "max_new_tokens": 512,
            "max_length": 4096,
            "pad_token_id": 0,
        },
    )
    assert got.sampling == {
        "temperature": 0.6,
        "top_k": 50,
        "repetition_penalty": 1.05,
        "max_tokens": 512,
    }


@pytest.mark.parametrize("eos", ["</s>", [1, "2"], True, -1, 1.5])
def test_end_tokens_must_be_ids(tmp_path, eos) -> None:
    with pytest.raises(CheckpointError, match="one id or a list of ids; got eos_token_id="):
        read(tmp_path, {"eos_token_id": eos})


@pytest.mark.parametrize(
    ("eos", "message"),
    [
        ([2, 128], "in the vocabulary; got eos_token_id=128 with vocab_size=128. Correct"),
        (list(range(65)), "at most 64 end tokens; got 65. Correct"),
    ],
)
def test_end_tokens_that_no_request_could_have(tmp_path, eos, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, {"eos_token_id": eos}, {"vocab_size": 128})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", 50.0),
        ("top_p", 0),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
    ],
)
def test_sampling_values_must_be_in_range_where_they_are_read(tmp_path, key, value) -> None:
    with pytest.raises(CheckpointError, match="must have valid sampling .*; got .* Correct the fi"):
        read(tmp_path, {key: value})
    assert read_generation_config(tmp_path, {}, sampling=False).sampling == {}


@pytest.mark.parametrize("value", ["0.6", True, [0.6]])
def test_sampling_values_must_be_numbers(tmp_path, value) -> None:
    with pytest.raises(
        CheckpointError, match="must give temperature as a number; got temperature="
    ):
        read(tmp_path, {"temperature": value})


def test_broken_file(tmp_path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json is not JSON"):
        read_generation_config(tmp_path, {})
