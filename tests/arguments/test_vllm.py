"""Engine arguments of a script that comes from vLLM keep their meaning or are refused."""

from typing import Any

import pytest

from jinfer.arguments.vllm import translated
from jinfer.llm import engine_config


@pytest.mark.parametrize(
    "usual",
    [
        {"tensor_parallel_size": 1, "pipeline_parallel_size": 1},
        {"trust_remote_code": True},
        {"trust_remote_code": False},
        {"enable_prefix_caching": True, "enable_chunked_prefill": True, "enforce_eager": False},
        {"tokenizer_mode": "auto", "quantization": None, "cpu_offload_gb": 0},
        {"disable_log_stats": True, "revision": None, "swap_space": 0},
        {"scheduling_policy": "priority", "kv_offloading_backend": "native"},
    ],
)
def test_what_jinfer_does_anyway_is_accepted(usual: dict[str, Any]) -> None:
    assert engine_config("m", {"seed": 3, **usual}) == engine_config("m", {"seed": 3})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pipeline_parallel_size", 2, "must be 1; got pipeline_parallel_size=2. jinfer has tensor"),
        ("enforce_eager", True, "got enforce_eager=True. Every step is compiled .* Leave it out"),
        ("quantization", "awq", "must be None; got quantization='awq'. Weights are floating point"),
        ("swap_space", 4, "got swap_space=4. KV pages go to host memory with kv_offloading_size"),
        ("revision", "v2", "must be None or 'main'; got revision='v2'. .*download another"),
    ],
)
def test_anything_else_is_refused_with_the_reason(name: str, value: Any, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        engine_config("m", {name: value})


def test_other_spellings_are_translated() -> None:
    config = engine_config("m", {"block_size": 32, "num_gpu_blocks_override": 99})
    assert (config.page_size, config.num_pages) == (32, 99)


@pytest.mark.parametrize("names", [("block_size", "page_size"), ("page_size", "block_size")])
def test_both_spellings_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(TypeError, match="block_size is called page_size in jinfer; got both"):
        translated(dict.fromkeys(names, 16))


def test_unknown_names_are_told_by_the_config() -> None:
    assert translated({"max_num_seq": 3}) == {"max_num_seq": 3}
    with pytest.raises(TypeError, match="got 'max_num_seq'. Did you mean max_num_seqs"):
        engine_config("m", {"max_num_seq": 3})
