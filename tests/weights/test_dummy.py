"""Random parameters have the loaded tree's structure and a sensible size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoint import write_llama_checkpoint

from jinfer.weights.dummy import _Part, _uniform, dummy_params
from jinfer.weights.load import load_params, read_model_config

F32 = jnp.dtype(jnp.float32)
MLP = _Part("LFD", (4, 256, 256), (4, 256, 256))
QUERIES = _Part("LQD", (4, 128, 64), (4, 128, 64))
REPEATED = _Part("LCD", (4, 64, 64), (4, 32, 64))  # kv heads, each held twice


@pytest.fixture
def folder(tmp_path):
    return write_llama_checkpoint(tmp_path, seed=0, attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize(("layer_loop", "dtype"), [("scan", "bfloat16"), ("unrolled", "float16")])
def test_tree_is_the_one_that_loading_gives(folder, layer_loop, dtype) -> None:
    config = read_model_config(folder)
    loaded, _ = load_params(folder, config, dtype=dtype, layer_loop=layer_loop)
    dummy = dummy_params(config, dtype=dtype, layer_loop=layer_loop, seed=0)

    def description(params):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)

    assert description(dummy) == description(loaded)


def test_scale_is_the_inverse_root_of_the_inputs(folder) -> None:
    params = dummy_params(read_model_config(folder), dtype="float32", layer_loop="scan", seed=0)
    blocks = params["blocks"]
    for array, fan_in in (
        (params["embed_VD"], 64),
        (params["lm_head_VD"], 64),
        (blocks["w_qkv_UD"], 64),
        (blocks["w_o_DQ"], 4 * 16),
        (blocks["w_gate_up_YD"], 64),
        (blocks["w_down_DF"], 96),
    ):
        # 4,000 to 12,000 draws: the deviation is within 5 % of its expectation.
        np.testing.assert_allclose(np.std(array), fan_in**-0.5, rtol=0.05)
        assert abs(np.mean(array)) < 0.05 * fan_in**-0.5
    np.testing.assert_array_equal(blocks["attn_norm_D"], 1.0)
    np.testing.assert_array_equal(blocks["b_q_NH"], 0.0)


def test_seed_decides_and_layers_and_leaves_differ(folder) -> None:
    config = read_model_config(folder)

    def draw(seed):
        return dummy_params(config, dtype="float32", layer_loop="unrolled", seed=seed)

    first, again, other = draw(0), draw(0), draw(1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    w_gate, w_up = np.split(np.asarray(first["blocks"][0]["w_gate_up_YD"]), 2)
    for different in (
        other["blocks"][0]["w_gate_up_YD"][: len(w_gate)],
        first["blocks"][1]["w_gate_up_YD"][: len(w_gate)],
        w_up,
    ):
        assert np.mean(w_gate == np.asarray(different)) < 0.01


def test_drawing_needs_no_room_beside_the_result() -> None:
    for dtype in (jnp.dtype(jnp.bfloat16), F32):
        for parts in ((MLP,), (QUERIES, REPEATED, REPEATED)):
            draw = partial(_uniform, parts=parts, num_shards=4, head_dim=16, dtype=dtype)
            numbers = tuple(range(len(parts)))
            program = jax.jit(draw).lower(0, numbers, 0.5).compile()
            assert program.memory_analysis().temp_size_in_bytes == 0


def test_joined_parts_are_drawn_as_they_are_alone() -> None:
    def draw(parts, numbers, num_shards):
        return np.asarray(
            _uniform(5, numbers, 0.5, parts=parts, num_shards=num_shards, head_dim=16, dtype=F32)
        )

    q, k, v = draw((QUERIES,), (3,), 1), draw((REPEATED,), (4,), 1), draw((REPEATED,), (7,), 1)
    got = draw((QUERIES, REPEATED, REPEATED), (3, 4, 7), 4)
    shards = [np.split(array, 4, axis=1) for array in (q, k, v)]
    want = np.concatenate([part for parts in zip(*shards, strict=True) for part in parts], axis=1)
    np.testing.assert_array_equal(got, want)
    # A stored head stands twice beside itself.
    np.testing.assert_array_equal(k[:, :16], k[:, 16:32])


def test_names_must_be_known(folder) -> None:
    config = read_model_config(folder)
    with pytest.raises(ValueError, match="got dtype='fp8'"):
        dummy_params(config, dtype="fp8", layer_loop="scan", seed=0)
    with pytest.raises(ValueError, match="got layer_loop='while'"):
        dummy_params(config, dtype="float32", layer_loop="while", seed=0)
