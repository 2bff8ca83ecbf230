"""Which attention is chosen, and that switching it changes no token."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from aot_programs import CONFIG, DECODE, LLAMA_3_8B, STEP, programs_for
from engine_runs import Job, make_engine, run_jobs, tokens_of
from random_checkpoint import write_llama_checkpoint

from jinfer.config import EngineConfig
from jinfer.request.params import SamplingParams
from jinfer.request.tokenizer import load_tokenizer
from jinfer.shipped import target_folder
from jinfer.startup.plan import resolve_plan
from jinfer.step.attention import default_attention, require_served
from jinfer.weights.load import read_model_config
from kernels_pallas.paged_attention.pages import cells_of


@pytest.mark.parametrize(
    ("platform", "head_dim", "want"),
    [
        ("cpu", 64, "xla"),
        ("gpu", 64, "xla_wide"),
        ("tpu", 128, "tpu"),
        ("tpu", 96, "tpu"),
        ("tpu", 24, "xla_wide"),
    ],
)
def test_default(platform: str, head_dim: int, want: str, tmp_path: Path) -> None:
    model = read_model_config(write_llama_checkpoint(tmp_path, seed=0, head_dim=head_dim))
    assert default_attention(model, platform=platform, dtype="bfloat16") == want


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"attention": "tpu"}, "attention='tpu' needs a TPU; got platform='cpu'"),
        ({"attention": "tpu_interpret", "dtype": "float16"}, "on TPU, .* got dtype=float16"),
        ({"attention": "gpu_interpret"}, "on GPU, .* got float32. Convert them, or"),
    ],
)
def test_what_an_attention_cannot_do_is_refused_before_the_weights_are_read(
    asked: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "jinfer.startup.load.load_params", lambda *_, **__: pytest.fail("weights read")
    )
    with pytest.raises(NotImplementedError, match=message):
        make_engine(write_llama_checkpoint(tmp_path, seed=0), **asked)


def test_a_decode_program_attends_in_one_pass() -> None:
    """Of one token per row; a step has another pass for rows with more."""
    config = replace(CONFIG, attention="tpu_interpret", dtype="float32")
    model = replace(LLAMA_3_8B, num_layers=2)
    plan = resolve_plan(config, model, platform="cpu", free_bytes=1 << 30)
    programs = programs_for(jax.devices()[:1], model, plan)
    texts = {p.name: str(jax.make_jaxpr(p.function)(*p.shapes)) for p in programs}
    num_kernels = {name: texts[name].count("pallas_call[") for name in (DECODE, STEP)}
    write_and_attend = 2  # a layer is printed once, however many call it
    assert num_kernels == {DECODE: write_and_attend, STEP: write_and_attend + 1}


# What a name asks of the engine beside: the GPU kernel takes 16 bits, and larger 8-bit pages.
ON_THE_SHIPPED_MODEL = [
    pytest.param("xla_wide", {}, id="xla_wide"),
    pytest.param("tpu_interpret", {}, id="tpu"),
    pytest.param("gpu_interpret", {"dtype": "bfloat16"}, id="gpu"),
    pytest.param(
        "gpu_interpret",
        {"dtype": "bfloat16", "kv_cache_dtype": "int8", "page_size": 32},
        id="gpu_int8",
    ),
]


def test_small_8_bit_pages_are_refused_on_a_tpu() -> None:
    model = read_model_config(target_folder())
    for page_size, is_served in ((64, False), (128, True)):
        config = EngineConfig(model="-", kv_cache_dtype="int8", page_size=page_size)
        plan = resolve_plan(config, model, platform="tpu", free_bytes=1 << 30)
        refused = pytest.raises(NotImplementedError, match="multiple of 128 tokens; got .*=64. Le")
        with nullcontext() if is_served else refused:
            require_served(plan, model)


@pytest.mark.slow
# The simulators compile their steps when they meet them.
@pytest.mark.filterwarnings("ignore:nothing may compile after warm-up")
@pytest.mark.parametrize(("attention", "settings"), ON_THE_SHIPPED_MODEL)
def test_switching_changes_no_token_of_the_shipped_model(
    attention: str, settings: dict[str, Any]
) -> None:
    if attention == "gpu_interpret" and jax.__version_info__ < (0, 11):
        pytest.skip("the GPU kernel needs jax >= 0.11")
    folder = target_folder()
    encode = load_tokenizer(folder).encode
    jobs = [
        (encode(text), SamplingParams(temperature=temperature, seed=1, max_tokens=max_tokens))
        for text, temperature, max_tokens in (
            ("Once upon a time there was a fox who", 0.0, 8),
            ("The king", 0.9, 10),
            ("In the forest lived an old woman and her two sons, and they", 0.0, 12),
        )
    ]
    expected = tokens_with("xla", folder, jobs, max_model_len=64, **settings)
    assert tokens_with(attention, folder, jobs, max_model_len=64, **settings) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:nothing may compile after warm-up")
def test_switching_changes_no_token_of_heads_stored_wider(tmp_path: Path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=1, head_dim=96)
    jobs = [
        (list(range(3, 3 + length)), SamplingParams(temperature=t, seed=1, max_tokens=6))
        for length, t in ((20, 0.0), (5, 0.9), (33, 0.0))
    ]
    expected = tokens_with("xla", folder, jobs, kv_cache_dtype="int8")
    stored = {"stored_width": 128, "kv_cache_dtype": "int8"}
    assert tokens_with("tpu_interpret", folder, jobs, **stored) == expected


def tokens_with(
    attention: str, folder: Path, jobs: list[Job], *, stored_width: int | None = None, **asked: Any
) -> list[list[list[int]]]:
    """The jobs' tokens, two at once and prompts in chunks of at most 8."""
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "late_compile": "warn"}
    engine = make_engine(folder, attention=attention, **settings, **asked)
    if stored_width is not None:
        assert cells_of(engine.runner.pages).shape[-1] == 2 * stored_width
    outputs = run_jobs(engine, jobs, may_compile=attention.endswith("_interpret"))
    engine.close()
    return [tokens_of(output) for output in outputs]
