"""Many devices compute what one computes: the whole engine, on 8 virtual ones."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from collectives import collectives_in
from engine_runs import Job, logprobs_of, make_engine, random_prompt, run_jobs, tokens_of
from random_checkpoint import write_llama_checkpoint

from jinfer.config import EngineConfig, ModelConfig
from jinfer.parallel.mesh import make_mesh
from jinfer.parallel.model_shards import padded_model
from jinfer.parallel.sharding import Placement
from jinfer.request.output import RequestOutput
from jinfer.request.params import SamplingParams
from jinfer.startup.plan import resolve_plan
from jinfer.startup.programs import state_shapes, step_programs
from jinfer.weights.dummy import dummy_params
from jinfer.weights.layout import hold_as, put_held
from jinfer.weights.load import load_params, read_model_config

VOCAB_SIZE = 133  # filled up on every mesh, and cut in the middle of a word of mask bits
NUM_LAYERS = 2
SMALL: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 8}
ONE_STEP: dict[str, Any] = {**SMALL, "max_decode_steps": 1}  # two programs
SHAPE: dict[str, Any] = {
    "num_attention_heads": 8,
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": NUM_LAYERS,
}


def jobs() -> list[Job]:
    """Greedy, sampled with seeds, and everything that looks at single tokens of the vocabulary."""
    rng = np.random.default_rng(0)
    common: dict[str, Any] = {"max_tokens": 16, "logprobs": 3, "ignore_eos": True}
    edges = {0: -3.0, 127: 2.0, 128: 2.5, 132: 3.0}
    asked = [
        SamplingParams(temperature=0, prompt_logprobs=2, **common),
        SamplingParams(temperature=1, seed=3, top_p=0.9, top_k=50, **common),
        SamplingParams(temperature=1.5, seed=5, n=2, **common),
        SamplingParams(temperature=0.7, seed=7, min_p=0.02, logit_bias=edges, **common),
        SamplingParams(
            temperature=1,
            seed=9,
            repetition_penalty=1.3,
            presence_penalty=0.2,
            frequency_penalty=0.1,
            allowed_token_ids=range(90, VOCAB_SIZE),
            stop_token_ids=[131, 100],
            min_tokens=12,
            **common,
        ),
        SamplingParams(temperature=0, logit_bias={132: 100.0}, **common),
    ]
    return [(random_prompt(rng), params) for params in asked]


def assert_same(one: list[RequestOutput], other: list[RequestOutput]) -> None:
    for want, got in zip(one, other, strict=True):
        assert tokens_of(got) == tokens_of(want)
        for index in range(len(want.outputs)):
            difference = logprobs_of(got, index) - logprobs_of(want, index)
            np.testing.assert_allclose(difference, 0, atol=1e-4)
            assert ranks_of(got, index) == ranks_of(want, index)


def ranks_of(output: RequestOutput, index: int) -> list[dict[int, int | None]]:
    """Of each drawn token and the most probable ones beside it."""
    logprobs = output.outputs[index].logprobs
    assert logprobs is not None
    return [{token: one.rank for token, one in entry.items()} for entry in logprobs]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Gives the checkpoint of so many kv heads."""

    @cache
    def folder_of(num_kv_heads: int) -> Path:
        return write_llama_checkpoint(
            tmp_path_factory.mktemp("checkpoint"),
            seed=num_kv_heads,
            num_key_value_heads=num_kv_heads,
            attention_bias=True,
            mlp_bias=True,
            **SHAPE,
        )

    return folder_of


@pytest.fixture(scope="module")
def alone(checkpoint: Callable[[int], Path]) -> Callable[[int], list[RequestOutput]]:
    """Gives what one device makes of the jobs, with so many kv heads."""

    @cache
    def outputs_of(num_kv_heads: int) -> list[RequestOutput]:
        engine = make_engine(checkpoint(num_kv_heads), **ONE_STEP)
        outputs = run_jobs(engine, jobs())
        engine.close()
        return outputs

    return outputs_of


# Heads repeated on every device or on some, as many as devices, more of them, and one model cut in
# two, four and eight.
@pytest.mark.parametrize(
    ("num_kv_heads", "size"), [(1, 2), (1, 8), (2, 2), (2, 4), (2, 8), (8, 4), (8, 8)]
)
def test_outputs_are_those_of_one_device(
    num_kv_heads: int, size: int, checkpoint: Any, alone: Any
) -> None:
    engine = make_engine(checkpoint(num_kv_heads), tensor_parallel_size=size, **ONE_STEP)
    assert_same(alone(num_kv_heads), run_jobs(engine, jobs()))
    engine.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_loop": "scan"},
        pytest.param({"attention": "tpu_interpret", "page_size": 8}, marks=pytest.mark.slow),
        {"kv_offloading_size": 0.01, "page_size": 4, "num_pages": 70},
    ],
    ids=["scan", "tpu kernel", "host tier"],
)
def test_every_way_to_run_is_cut_alike(
    settings: dict[str, Any], checkpoint: Any, alone: Any
) -> None:
    engine = make_engine(checkpoint(2), tensor_parallel_size=2, **SMALL, **settings)
    for _ in range(2):  # the second time from the prefix cache, where that holds the prompts
        assert_same(alone(2), run_jobs(engine, jobs()))
    engine.close()


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize(("num_kv_heads", "size"), [(8, 4), (2, 8), (1, 4)])
def test_weights_are_read_into_their_shards(
    num_kv_heads: int, size: int, layer_loop: str, checkpoint: Any
) -> None:
    folder = checkpoint(num_kv_heads)
    model = read_model_config(folder)
    padded = padded_model(model, size)
    placement = Placement(make_mesh(jax.devices(), size))
    hold = hold_as("default", placement.sharding)
    tree: dict[str, Any] = {"dtype": "float32", "layer_loop": layer_loop}
    for whole, cut in (
        (
            load_params(folder, model, **tree)[0],
            load_params(
                folder, model, padded=padded, **tree, put=lambda p, t: put_held(p, t, hold=hold)
            )[0],
        ),
        (
            dummy_params(model, seed=3, **tree),
            dummy_params(model, seed=3, padded=padded, hold=hold, **tree),
        ),
    ):
        jax.tree_util.tree_map_with_path(
            lambda path, a, b: assert_held(path[-1].key, a, b, model, size), whole, cut
        )


def assert_held(name: str, whole: jax.Array, cut: jax.Array, model: ModelConfig, size: int) -> None:
    """`cut` is `whole` on `size` devices, its kv heads repeated and its vocabulary filled up."""
    assert len(cut.sharding.device_set) == size
    axes = name.rsplit("_", 1)[1]
    want = np.asarray(whole)
    num_repeats = max(1, size // model.num_kv_heads)
    if axes.startswith("K"):
        want = np.repeat(want, num_repeats, axis=-2)
    if axes.startswith("U"):
        num_q = model.num_q_heads * model.head_dim
        num_kv = model.num_kv_heads * model.head_dim
        q, k, v = np.split(want, (num_q, num_q + num_kv), axis=-2)
        k, v = (repeated_heads(each, num_repeats, model.head_dim) for each in (k, v))
        shares = zip(*(np.split(each, size, axis=-2) for each in (q, k, v)), strict=True)
        want = np.concatenate([each for shard in shares for each in shard], axis=-2)
    if axes.startswith("Y"):
        shares = zip(
            *(np.split(each, size, axis=-2) for each in np.split(want, 2, axis=-2)), strict=True
        )
        want = np.concatenate([each for shard in shares for each in shard], axis=-2)
    got = np.asarray(cut)[: want.shape[0]] if axes.startswith("V") else np.asarray(cut)
    np.testing.assert_array_equal(got, want)
    if set(axes) & set("VNQKCFUY"):
        assert cut.addressable_shards[0].data.nbytes * size == cut.nbytes
    else:
        assert cut.is_fully_replicated


def repeated_heads(weight: np.ndarray, num_repeats: int, head_dim: int) -> np.ndarray:
    """A matrix [..., C, D] with each head's rows so many times, side by side."""
    heads = weight.reshape(*weight.shape[:-2], -1, head_dim, weight.shape[-1])
    return np.repeat(heads, num_repeats, axis=-3).reshape(*weight.shape[:-2], -1, weight.shape[-1])


def test_a_step_exchanges_two_sums_per_layer_and_nothing_large(checkpoint: Any) -> None:
    folder = checkpoint(2)
    model = read_model_config(folder)
    sizes: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16}
    config = EngineConfig(model=folder, tensor_parallel_size=4, **sizes)
    plan = resolve_plan(config, model, platform="cpu", free_bytes=1 << 30)
    placement = Placement(make_mesh(jax.devices(), 4))
    state = state_shapes(plan, padded_model(model, 4), placement)
    programs = {p.name: p for p in step_programs(plan, model, state, placement)}
    step = programs["step of 16 tokens"]
    exchanged = collectives_in(step.compile().as_text() or "")
    wide = [one for one in exchanged if one[2] >= 16 * model.hidden_size]
    # Each layer's two, and the one that looks up embeddings.
    assert wide == [("all-reduce", "f32", 16 * model.hidden_size)] * (2 * NUM_LAYERS + 1)
    num_logits_rows = 4 + 1
    assert all(one[2] <= num_logits_rows * 128 for one in exchanged if one not in wide)
