"""Draws against live transformers, over random parameters; needs the `agreement` extra."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_params(rng: np.random.Generator) -> dict[str, Any]:
    """About half of all parameters, at values people use."""
    choices: dict[str, Any] = {
        "top_k": int(rng.integers(1, 80)),
        "top_p": float(rng.uniform(0.3, 0.99)),
        "min_p": float(rng.uniform(0.001, 0.2)),
        "repetition_penalty": float(rng.uniform(0.8, 1.5)),
        "presence_penalty": float(rng.uniform(-2, 2)),
        "frequency_penalty": float(rng.uniform(-2, 2)),
        "logit_bias": {str(i): float(rng.normal() * 3) for i in rng.integers(0, 200, 5)},
        "bad_words": [[int(i)] for i in rng.integers(0, 200, 3)] + [[41, int(rng.integers(200))]],
        "min_tokens": int(rng.choice([0, 500])),
    }
    kept = {name: value for name, value in choices.items() if rng.random() < 0.5}
    return {"temperature": float(rng.uniform(0.4, 1.8)), **kept}


@pytest.mark.agreement
@pytest.mark.parametrize("seed", range(20))
def test_draws_follow_live_transformers(seed: int) -> None:
    pytest.importorskip("transformers")
    goldens, ours = load("make_sampler_goldens"), load("test_sampler")
    rng = np.random.default_rng(seed)
    logits_V = (rng.normal(size=ours.VOCAB) * rng.uniform(0.5, 4)).astype(np.float32)
    params = random_params(rng)
    golden = ours.GOLDEN
    probs_V = goldens.hf_probs(logits_V, golden["prompt_ids"], golden["output_ids"], params)
    token_R = ours.draw_many(logits_V, ours.request_row(params, seed=seed))
    assert (probs_V[token_R] > 0).all(), params
    assert ours.chi_square_p(token_R, probs_V) > 1e-4, params
