"""Which attention is chosen, and that switching it changes no token."""

from pathlib import Path
from typing import Any

import pytest
from engine_runs import make_engine, run_jobs, tokens_of
from random_checkpoint import write_llama_checkpoint

from jinfer.request.params import SamplingParams
from jinfer.step.attention import default_attention
from jinfer.weights.load import read_model_config
from kernels_pallas.paged_attention.pages import cells_of


@pytest.mark.parametrize(
    ("platform", "head_width", "want"),
    [
        ("cpu", 64, "xla"),
        ("gpu", 64, "xla_wide"),
        ("tpu", 128, "tpu"),
        ("tpu", 96, "tpu"),
        ("tpu", 24, "xla_wide"),
    ],
)
def test_default(platform: str, head_width: int, want: str, tmp_path: Path) -> None:
    model = read_model_config(write_llama_checkpoint(tmp_path, seed=0, head_dim=head_width))
    assert default_attention(model, platform=platform, dtype="bfloat16") == want


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"attention": "tpu"}, "attention='tpu' needs a TPU; got platform='cpu'"),
        ({"attention": "tpu_interpret", "dtype": "float16"}, "on TPU, .* got dtype=float16"),
    ],
)
def test_what_an_attention_cannot_do_is_refused_before_the_weights_are_read(
    asked: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jinfer.startup.load_params", lambda *_, **__: pytest.fail("weights read"))
    with pytest.raises(NotImplementedError, match=message):
        make_engine(write_llama_checkpoint(tmp_path, seed=0), **asked)


@pytest.mark.slow
# The simulator of the TPU kernel compiles its steps when it meets them.
@pytest.mark.filterwarnings("ignore:nothing may compile after warm-up")
@pytest.mark.parametrize(
    ("attention", "head_width", "kv_cache_dtype"),
    [("xla_wide", 64, "auto"), ("tpu_interpret", 64, "auto"), ("tpu_interpret", 96, "int8")],
)
def test_switching_changes_no_token(
    attention: str, head_width: int, kv_cache_dtype: str, tmp_path: Path
) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=1, head_dim=head_width)
    jobs = [
        (list(range(3, 3 + length)), SamplingParams(temperature=t, seed=1, max_tokens=6))
        for length, t in ((20, 0.0), (5, 0.9), (33, 0.0))
    ]
    tokens = {}
    for name in ("xla", attention):
        settings = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "late_compile": "warn"}
        engine = make_engine(folder, attention=name, kv_cache_dtype=kv_cache_dtype, **settings)
        stored_width = 128 if (name, head_width) == ("tpu_interpret", 96) else head_width
        assert cells_of(engine.runner.pages).shape[-1] == 2 * stored_width
        outputs = run_jobs(engine, jobs, may_compile=name == "tpu_interpret")
        tokens[name] = [tokens_of(output) for output in outputs]
        engine.close()
    assert tokens[attention] == tokens["xla"]
