"""Every file of `configs/` is understood, and fits the chips that it is meant for.

The chips are not here: the largest step and the largest loop of decode steps are compiled ahead of
time, and what they need is held against the chip's memory and against what was recorded.
"""

import json
from pathlib import Path

import pytest
from aot_configs import FOLDER, KEPT_SHARE, MODELS, RECORD, TARGETS, is_tpu, run

from jinfer import LLM, SamplingParams, read_config
from jinfer.cli.arguments import engine_args, parse

FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_every_file_has_its_chips_and_its_record() -> None:
    assert set(FILES) == set(TARGETS) | {"laptop-cpu"}
    assert set(json.loads(RECORD.read_text())) == set(TARGETS)
    for name in TARGETS:
        assert read_config(FOLDER / f"{name}.yaml")["model"] in MODELS


def test_the_file_for_a_laptop_runs() -> None:
    with LLM(**read_config(FOLDER / "laptop-cpu.yaml"), progress=False) as llm:
        assert llm.engine.plan.max_slots == 4
        [output] = llm.generate("Once upon a time", SamplingParams(max_tokens=4))
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_what_a_file_asks_for_fits(name: str) -> None:
    compiler = "libtpu" if is_tpu(TARGETS[name]) else "jax_plugins.xla_cuda13"
    pytest.importorskip(compiler, reason="its compiler is not here")
    recorded = json.loads(RECORD.read_text())[name]
    programs = run(name)
    assert {p["program"] for p in programs} == set(recorded["programs"])
    for program in programs:
        was = recorded["programs"][program["program"]]
        temporary_gb, needed = program["temporary_bytes"] / 1e9, program["argument_bytes"]
        print(f"{name}, {program['program']}: {needed / 1e9:.2f} GB and {temporary_gb:.3f} GB more")
        assert needed + program["temporary_bytes"] < (1 - KEPT_SHARE / 2) * program["chip_bytes"]
        assert program["aliased_bytes"] >= program["pool_bytes"]
        # A chip's and a compiler's version may move a little; a copy of anything would be much.
        assert temporary_gb <= 1.2 * was["temporary_gb"] + 0.05
        assert program["weight_bytes"] / 1e9 == pytest.approx(was["weight_gb"], abs=1e-3)
        assert program["kv_tokens"] == pytest.approx(recorded["kv_tokens"], rel=0.05)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("model: org/name\nmax_num_seqs: 8\nseed: 3\ndtype: float32\n")
    args = parse(["generate", "Hi", "--config", str(path), "--max-num-seqs", "2"])
    assert args.model == "org/name"
    assert engine_args(args) == {
        "max_num_seqs": 2,
        "seed": 3,
        "dtype": "float32",
        "progress": True,
    }
    assert parse(["generate", "Hi", "--config", str(path), "--model", "fable"]).model == "fable"


def test_keys_may_have_dashes_and_names_of_vllm(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("max-num-seqs: 8\nblock-size: 32\ntrust_remote_code: true\n")
    assert read_config(path) == {"max_num_seqs": 8, "page_size": 32}


def test_keys_may_be_merged_from_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(
        "hf_overrides: &o\n  rope_theta: 2.0\noverride_generation_config: {<<: *o, a: 1}"
    )
    assert read_config(path)["override_generation_config"] == {"rope_theta": 2.0, "a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq: 4", r"must hold arguments of the engine; got .*Did you mean max_num_seqs"),
        ("quantization: awq\nxyz: 1", r"(?s)2 arguments .*'xyz'.*quantization='awq'"),
        ("max-num-seqs: 4\nmax_num_seqs: 4", "a key may be there once, with dashes or under"),
        (
            "page_size: 16\npage_size: 32",
            "must be YAML; .*the key 'page_size' is there twice.*line 2",
        ),
        ("hf_overrides: {rope_theta: 1, rope_theta: 2}", "the key 'rope_theta' is there twice"),
        ("- 4", "must be a mapping of arguments; got list in .*Write lines such as"),
        ("", "must be a mapping of arguments; got NoneType"),
        ("model: [", "must be YAML; got .*Correct it"),
        (None, "must be a file; got .*No such file.*Name another"),
    ],
)
def test_what_is_no_configuration_is_refused(
    text: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "engine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path)
