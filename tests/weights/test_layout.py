"""Weights held in another layout than the device's own are the same weights.

A CPU knows no tiles, so here matrices are transposed in memory instead; tests/test_aot_programs.py
compiles the tiles of a TPU 7x.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from engine_runs import make_engine, run_jobs, tokens_of
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding
from random_checkpoint import write_llama_checkpoint

from jinfer.config import EngineConfig
from jinfer.request.params import SamplingParams
from jinfer.startup.plan import resolve_plan
from jinfer.weights.dummy import dummy_params
from jinfer.weights.layout import hold_as, put_held
from jinfer.weights.load import load_params, read_model_config

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def hold_transposed(path: str, axes: str) -> Sharding | Format:
    held = hold_as("16x128", lambda _: SHARDING)(path, axes)
    if not isinstance(held, Format):
        return held
    num_axes = len(axes)
    return Format(Layout((*range(num_axes - 2), num_axes - 1, num_axes - 2)), SHARDING)


def assert_held(plain: Any, held: Any) -> None:
    """The same numbers, every matrix but the embedding transposed in memory."""
    jax.tree.map(np.testing.assert_array_equal, plain, held)
    for path, array in jax.tree_util.tree_leaves_with_path(held):
        name = path[-1].key
        order = array.format.layout.major_to_minor
        is_matrix = name.startswith("w_") or name == "lm_head_VD"
        assert (order[-1] != array.ndim - 1) == is_matrix, name


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
def test_loaded_and_drawn_weights_are_the_same(layer_loop: str, tmp_path: Path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0, attention_bias=True)
    model = read_model_config(folder)
    tree: dict[str, Any] = {"dtype": "float32", "layer_loop": layer_loop}
    loaded, _ = load_params(folder, model, **tree)
    held, _ = load_params(
        folder, model, **tree, put=lambda path, t: put_held(path, t, hold=hold_transposed)
    )
    assert_held(loaded, held)
    drawn = dummy_params(model, **tree, seed=1)
    assert_held(drawn, dummy_params(model, **tree, seed=1, hold=hold_transposed))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_an_engine_takes_weights_as_they_are_held(
    load_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0)
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "layer_loop": "scan"}
    params = SamplingParams(max_tokens=6, temperature=0.9, seed=1, ignore_eos=True)
    tokens = []
    for held in (False, True):
        if held:
            monkeypatch.setattr("jinfer.startup.plan._weight_layout", lambda *_: "16x128")
            for module in ("load", "programs"):
                monkeypatch.setattr(f"jinfer.startup.{module}.hold_as", lambda *_: hold_transposed)
        engine = make_engine(folder, load_format=load_format, **sizes)
        assert engine.plan.weight_layout == ("16x128" if held else "default")
        order = engine.runner.params["blocks"]["w_qkv_UD"].format.layout.major_to_minor
        assert order == ((0, 2, 1) if held else (0, 1, 2))
        [output] = run_jobs(engine, [(list(range(3, 23)), params)])
        tokens.append(tokens_of(output))
        engine.close()
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("platform", "device_kind", "dtype", "want"),
    [
        ("tpu", "TPU7x", "bfloat16", "16x128"),
        ("tpu", "TPU7x", "float32", "default"),
        ("tpu", "TPU v6 lite", "bfloat16", "default"),
        ("cpu", "cpu", "bfloat16", "default"),
    ],
)
def test_only_bfloat16_on_a_7x_is_held_otherwise(
    platform: str, device_kind: str, dtype: str, want: str, tmp_path: Path
) -> None:
    model = read_model_config(write_llama_checkpoint(tmp_path, seed=0))
    config = EngineConfig(model="m", dtype=dtype)
    plan = resolve_plan(config, model, platform=platform, free_bytes=2**30, device_kind=device_kind)
    assert plan.weight_layout == want
    held = hold_as(plan.weight_layout, lambda _: SHARDING)
    assert isinstance(held("blocks.3.w_qkv_UD", "UD"), Format) == (want == "16x128")
    assert held("embed_VD", "VD") == held("blocks.attn_norm_D", "LD") == SHARDING
