"""Engine arguments of a script that comes from vLLM keep their meaning or are refused."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jinfer.arguments.vllm import engine_config
from jinfer.arguments.vllm_older import OLDER
from jinfer.arguments.vllm_rows import equal, only, table
from jinfer.arguments.vllm_table import TABLE
from jinfer.config import EngineConfig
from jinfer.startup.checks import check_config

# The fields of AsyncEngineArgs of vLLM 0.33 with their defaults; {} for a configuration object.
VLLM = json.loads((Path(__file__).parent / "vllm_0_33.json").read_text(encoding="utf-8"))
OWN = {field.name for field in fields(EngineConfig)}
PLAIN = EngineConfig(model="m")
ROWS = {**TABLE, **OLDER}


def config_of(**asked: Any) -> EngineConfig:
    return engine_config("m", asked)


# -- the whole table


def test_the_table_has_every_argument_of_vllm_and_no_other() -> None:
    assert len(VLLM) == 260
    assert set(TABLE) == set(VLLM)
    assert not set(OLDER) & set(VLLM)


def test_the_defaults_are_vllms() -> None:
    defaults = {name: row.default for name, row in TABLE.items()}
    listed = {name: sorted(d) if isinstance(d, set) else d for name, d in defaults.items()}
    assert [name for name in VLLM if type(listed[name]) is not type(VLLM[name])] == []
    assert listed == VLLM


def test_each_row_has_one_fate_and_a_reason() -> None:
    for name, row in ROWS.items():
        assert sum([row.own is not None, bool(row.accepts), row.any_value]) == 1, name
        if row.own:
            assert row.own in OWN and (name == row.own) == (name in OWN), name
        else:
            assert name not in OWN, f"{name} is a field of EngineConfig"
            assert row.note.endswith("."), f"the note of {name} is a sentence of a message"


def test_vllms_defaults_are_accepted() -> None:
    for name, row in TABLE.items():
        if name != "model":
            got = config_of(**{name: row.default})
            check_config(got)
            assert row.own or got == PLAIN, name


def test_other_values_are_refused() -> None:
    refusing = [name for name, row in ROWS.items() if row.accepts]
    assert len(refusing) > 200
    for name in refusing:
        told = rf"^{name} must be .*; got {name}=.*\. Leave it out\.$"
        with pytest.raises(NotImplementedError, match=told):
            config_of(**{name: "a value that nothing accepts"})
        with pytest.raises(NotImplementedError, match=told):
            config_of(**{name: object()})
        for value in ROWS[name].accepts:
            assert config_of(**{name: value}) == PLAIN, name


def test_some_arguments_make_no_difference() -> None:
    for name in [name for name, row in ROWS.items() if row.any_value]:
        assert config_of(**{name: object()}) == PLAIN, name


# -- single values


@pytest.mark.parametrize(
    "usual",
    [
        {"tensor_parallel_size": 1, "pipeline_parallel_size": 1},
        {"trust_remote_code": True},
        {"enable_prefix_caching": True, "enable_chunked_prefill": True},
        {"tokenizer_mode": "auto", "quantization": None, "cpu_offload_gb": 0},
        {"runner": "generate", "convert": "none", "async_scheduling": True},
        {"task": "generate", "device": "auto", "convert": "auto", "revision": None},
        {"scheduling_policy": "priority", "kv_offloading_backend": "native"},
        {"max_model_len": -1, "long_prefill_token_threshold": 0, "enable_prefix_caching": None},
        {"compilation_config": {}, "limit_mm_per_prompt": {"image": 2}, "max_model_len": "auto"},
        {"distributed_executor_backend": "mp", "disable_custom_all_reduce": True},
    ],
)
def test_what_jinfer_does_anyway_is_accepted(usual: dict[str, Any]) -> None:
    assert config_of(seed=3, **usual) == config_of(seed=3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pipeline_parallel_size", 2, "must be 1; got pipeline_parallel_size=2. Use tensor_para"),
        ("quantization", "awq", "must be None; got quantization='awq'. Quantized weights are not"),
        ("runner", "pooling", "must be 'auto' or 'generate'; got runner='pooling'. jinfer gener"),
        ("device", "cuda", "must be 'auto'; got device='cuda'. Set the variable JAX_PLATFORMS"),
    ],
)
def test_anything_else_is_refused_with_the_reason(name: str, value: Any, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        config_of(**{name: value})


def test_overrides_of_config_json_are_a_dict() -> None:
    for value in (None, {}, {"rope_theta": 1e6}):
        check_config(config_of(hf_overrides=value))
    with pytest.raises(
        ValueError, match="^hf_overrides must be a dict; got .*'rope_theta': 1000000"
    ):
        check_config(config_of(hf_overrides=lambda config: config))
    with pytest.raises(NotImplementedError, match="rope_theta=1.0. Pass it in hf_overrides"):
        config_of(rope_theta=1.0)


def test_an_array_is_no_accepted_value() -> None:
    with pytest.raises(NotImplementedError, match="quantization must be None"):
        config_of(quantization=np.zeros(2))
    assert not equal(np.zeros(2), 0) and equal([], [])


@pytest.mark.parametrize(
    ("theirs", "value", "ours"),
    [
        ("block_size", 32, "page_size"),
        ("num_gpu_blocks_override", 99, "num_pages"),
        ("swap_space", 4, "kv_offloading_size"),
        ("num_scheduler_steps", 8, "max_decode_steps"),
        ("jit_monitor_mode", "error", "late_compile"),
        ("use_tqdm_on_load", False, "progress"),
    ],
)
def test_other_names_are_translated(theirs: str, value: Any, ours: str) -> None:
    assert config_of(**{theirs: value}) == config_of(**{ours: value}) != PLAIN


@pytest.mark.parametrize(
    "dtype", [np.float16, np.dtype("float16"), ml_dtypes.bfloat16, np.float32], ids=str
)
def test_a_dtype_may_be_an_object(dtype: Any) -> None:
    assert config_of(dtype=dtype).dtype == np.dtype(dtype).name


def test_a_dtype_of_torch_is_known_by_its_name() -> None:
    class Dtype:
        def __repr__(self) -> str:
            return "torch.bfloat16"

    assert config_of(dtype=Dtype()).dtype == "bfloat16"


def test_an_access_token_is_not_shown() -> None:
    assert "secret" not in repr(config_of(hf_token="secret"))
    with pytest.raises(ValueError, match="hf_token must be .*; got list") as caught:
        check_config(config_of(hf_token=["secret"]))
    assert "secret" not in str(caught.value)


# -- names


@pytest.mark.parametrize("names", [("block_size", "page_size"), ("page_size", "block_size")])
def test_both_names_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(TypeError, match="block_size is called page_size in jinfer; got both"):
        config_of(**dict.fromkeys(names, 16))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_num_seq", "Did you mean max_num_seqs?"),
        ("gpu_memory_utilisation", "Did you mean gpu_memory_utilization?"),
        ("kv_transfer", "See help"),  # nothing of jinfer is near
        ("torch_dtype_name", "See help"),
        ("speculative", "See help"),
    ],
)
def test_a_hint_is_near_or_absent(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=rf"LLM has no argument of this name; got '{name}'") as told:
        config_of(**{name: 3})
    assert hint in str(told.value)


def test_a_parameter_of_a_request_is_sent_there() -> None:
    with pytest.raises(TypeError, match=r"got 'top_p'. .*SamplingParams\(top_p=...\)"):
        engine_config("m", {"top_p": 0.9}, of_requests=["top_p"])


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(TypeError) as told:
        config_of(max_num_seq=3, quantization="awq", enable_lora=True, seed=1, block=2)
    lines = str(told.value).splitlines()
    assert lines[0] == "4 arguments of LLM must be changed:"
    for name in ("max_num_seq", "quantization", "enable_lora", "block"):
        assert sum(name in line for line in lines[1:]) == 1
    with pytest.raises(NotImplementedError, match="^2 arguments of LLM must be changed"):
        config_of(quantization="awq", enable_lora=True)


def test_all_values_out_of_range_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)^2 arguments .*page_size.*gpu_memory_utilization"):
        check_config(config_of(page_size=0, gpu_memory_utilization=2.0))


def test_a_name_may_have_one_row() -> None:
    with pytest.raises(AssertionError, match="two rows"):
        table(only("A.", a=1), only("B.", a=2))
