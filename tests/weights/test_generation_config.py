"""End tokens and sampling defaults, as a checkpoint's two files name them."""

import logging
import re

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


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jinfer"), "propagate", True)
    return caplog


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, "sets no_repeat_ngram_size=3, num_beams=4, "),
        ({"suppress_tokens": [5]}, r"sets suppress_tokens=\[5\], which jinfer does not read"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "sets min_new_tokens=9, which"),
        (
            {"do_sample": False, "temperature": 0.6},
            "do_sample=false.* sample at temperature=0.6 un",
        ),
        ({"do_sample": False}, "do_sample=false.* sample at temperature=1.0 unless"),
        ({"do_sample": True, "temperature": 0}, "do_sample=true.*takes the likeliest token"),
    ],
)
def test_a_key_that_does_not_count_is_told(tmp_path, said, content, line) -> None:
    read(tmp_path, content)
    assert len(said.messages) == 1 and re.search(line, said.messages[0])
    said.clear()
    write_json(tmp_path / "generation_config.json", content)
    read_generation_config(tmp_path, {}, source="vllm")
    assert not said.messages


@pytest.mark.parametrize(
    "content",
    [
        {"do_sample": True, "temperature": 0.6},
        {"do_sample": False, "temperature": 0.0},
        {"num_beams": 1, "num_beam_groups": None, "typical_p": 1.0, "suppress_tokens": []},
        {"max_length": 20, "max_new_tokens": 512, "transformers_version": "5.0", "use_cache": True},
    ],
)
def test_no_line_about_what_asks_for_nothing(tmp_path, said, content) -> None:
    read(tmp_path, content)
    assert not said.messages


def test_max_new_tokens_decides_beside_max_length(tmp_path) -> None:
    assert read(tmp_path, {"max_length": 20, "max_new_tokens": 512}).sampling["max_tokens"] == 512
    assert "max_tokens" not in read(tmp_path, {"max_length": 20}).sampling


@pytest.mark.parametrize("value", ["false", 0])
def test_do_sample_must_be_a_bool(tmp_path, value) -> None:
    with pytest.raises(CheckpointError, match="give do_sample as true or false; got do_sample="):
        read(tmp_path, {"do_sample": value})


@pytest.mark.parametrize("eos", ["</s>", "2", ["2"], [1, "2"], True, -1, 1.5])
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
    assert read_generation_config(tmp_path, {}, source="vllm").sampling == {}


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


def read_with(tmp_path, source="auto", **overrides):
    write_json(tmp_path / "generation_config.json", {"temperature": 0.6, "top_k": 50})
    return read_generation_config(tmp_path, {"eos_token_id": 2}, source=source, overrides=overrides)


def test_overrides_win_over_the_file(tmp_path) -> None:
    got = read_with(tmp_path, temperature=0.9, max_new_tokens=7, top_k=None, eos_token_id=[3, 4])
    assert got.sampling == {"temperature": 0.9, "max_tokens": 7}
    assert got.eos_token_ids == (3, 4)


def test_a_temperature_of_the_user_is_no_contradiction(tmp_path, caplog) -> None:
    write_json(tmp_path / "generation_config.json", {"do_sample": True})
    for temperature in (0.0, None):
        overrides = {} if temperature is None else {"temperature": temperature}
        read_generation_config(tmp_path, {}, overrides=overrides)
    assert caplog.messages == []
    write_json(tmp_path / "generation_config.json", {"do_sample": True, "temperature": 0.0})
    read_generation_config(tmp_path, {})
    assert "do_sample=true, which does not count" in caplog.text


def test_overrides_count_without_the_file_too(tmp_path) -> None:
    assert read_with(tmp_path, "vllm", temperature=0.9).sampling == {"temperature": 0.9}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"do_sample": True, "temprature": 1}, "takes the keys .*; got 'do_sample', 'temprature'."),
        ({"temperature": -1}, "must hold valid values: temperature must be in"),
        ({"top_k": "many"}, "must hold valid values: top_k must be an integer"),
    ],
)
def test_overrides_that_cannot_be_honoured_are_refused(tmp_path, overrides, message) -> None:
    with pytest.raises(ValueError, match=f"override_generation_config {message}"):
        read_with(tmp_path, **overrides)


def test_the_file_of_another_folder(tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="'auto', 'vllm' or a folder with .*; got .*other"):
        read_with(tmp_path, other)
    write_json(other / "generation_config.json", {"top_p": 0.5})
    assert read_with(tmp_path, str(other)).sampling == {"top_p": 0.5}
