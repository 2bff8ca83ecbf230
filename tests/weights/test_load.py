"""Reading checkpoints: the right numbers in the right places, or one clear sentence."""

import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_checkpoint import (
    DTYPES,
    SMALL_LLAMA,
    random_llama_tensors,
    write_json,
    write_llama_checkpoint,
    write_tensors,
)

from jinfer.errors import CheckpointError
from jinfer.parallel.model_shards import padded_model
from jinfer.weights.host_tensor import HostTensor
from jinfer.weights.load import load_params, put_on_first_device, read_model_config
from jinfer.weights.safetensors import open_checkpoint

BIASED = {"attention_bias": True, "mlp_bias": True}


def load(folder, *, dtype="float32", layer_loop="unrolled", put=None, num_chips=1):
    config = read_model_config(folder)
    padded = padded_model(config, num_chips)
    return load_params(folder, config, dtype=dtype, layer_loop=layer_loop, padded=padded, put=put)


def rewrite(folder, change):
    """Applies `change` to the dict of tensors and writes them back as one file."""
    tensors = random_llama_tensors(SMALL_LLAMA, seed=0)
    change(tensors)
    write_tensors(folder, tensors)


@pytest.fixture
def folder(tmp_path):
    return write_llama_checkpoint(tmp_path / "model", seed=0)


def expected_block(tensors, layer):
    """The layout, written out by hand for 4 query heads and 2 kv heads of 16 and width 64."""
    at = f"model.layers.{layer}."
    w = {name: tensors[f"{at}{name}.weight"] for name in ("mlp.gate_proj", "mlp.up_proj")}
    attention = {x: tensors[f"{at}self_attn.{x}_proj.weight"] for x in "qkvo"}
    bias = {x: tensors[f"{at}self_attn.{x}_proj.bias"] for x in "qkvo"}
    return {
        "attn_norm_D": tensors[f"{at}input_layernorm.weight"],
        "w_qkv_UD": np.concatenate([attention[x] for x in "qkv"]),
        "w_o_DQ": attention["o"],
        "mlp_norm_D": tensors[f"{at}post_attention_layernorm.weight"],
        "w_gate_up_YD": np.concatenate([w["mlp.gate_proj"], w["mlp.up_proj"]]),
        "w_down_DF": tensors[f"{at}mlp.down_proj.weight"],
        "b_q_NH": bias["q"].reshape(4, 16),
        "b_k_KH": bias["k"].reshape(2, 16),
        "b_v_KH": bias["v"].reshape(2, 16),
        "b_o_D": bias["o"],
        "b_gate_F": tensors[f"{at}mlp.gate_proj.bias"],
        "b_up_F": tensors[f"{at}mlp.up_proj.bias"],
        "b_down_D": tensors[f"{at}mlp.down_proj.bias"],
    }


def expected_tree(tensors):
    return {
        "embed_VD": tensors["model.embed_tokens.weight"],
        "blocks": [expected_block(tensors, layer) for layer in range(2)],
        "final_norm_D": tensors["model.norm.weight"],
        "lm_head_VD": tensors["lm_head.weight"],
    }


@pytest.mark.parametrize("stored", list(DTYPES))
@pytest.mark.parametrize("wanted", list(DTYPES))
@pytest.mark.parametrize("shards", [1, 3])
def test_unrolled_tree_holds_every_number(tmp_path, stored, wanted, shards) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=1, shards=shards, dtype=stored, **BIASED)
    params, report = load(folder, dtype=wanted)
    tensors = random_llama_tensors(json.loads((folder / "config.json").read_text()), seed=1)
    stored_tensors = {name: tensor.astype(DTYPES[stored]) for name, tensor in tensors.items()}
    want = expected_tree({n: t.astype(DTYPES[wanted]) for n, t in stored_tensors.items()})
    assert jax.tree.structure(params) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    assert report.num_tensors == len(tensors)
    assert report.file_bytes == sum(tensor.nbytes for tensor in stored_tensors.values())
    assert report.param_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(want))


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_scanned_tree_is_the_unrolled_one_stacked(tmp_path, wanted) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=1, shards=2, num_hidden_layers=3, **BIASED)
    unrolled, _ = load(folder, dtype=wanted)
    scanned, _ = load(folder, dtype=wanted, layer_loop="scan")
    want = {
        **unrolled,
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *unrolled["blocks"]),
    }
    assert jax.tree.structure(scanned) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, scanned, want)


def test_large_tensors_are_copied_by_several_threads_correctly(tmp_path) -> None:
    folder = write_llama_checkpoint(
        tmp_path, seed=2, num_hidden_layers=1, hidden_size=1024, intermediate_size=1400
    )
    tensors = random_llama_tensors(json.loads((folder / "config.json").read_text()), seed=2)
    params, _ = load(folder, dtype="bfloat16")
    for leaf, names in (("w_gate_up_YD", ("gate", "up")), ("w_down_DF", ("down",))):
        parts = [tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in names]
        want = np.concatenate(parts).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(params["blocks"][0][leaf], want)


def test_a_parameter_may_be_held_in_another_order_than_it_is_stored(tmp_path) -> None:
    folder = write_llama_checkpoint(
        tmp_path, seed=2, num_hidden_layers=1, hidden_size=1024, intermediate_size=1400
    )
    stored = open_checkpoint(folder)["model.layers.0.mlp.gate_proj.weight"]
    tensor = HostTensor(
        axes="LDF",
        shape=(1, 1024, 1400),
        stored_shape=(1, 1024, 1400),
        head_dim=16,
        dtype=np.dtype(np.float32),
        layers=(stored,),
        stored_axes="FD",
    )
    want = stored.read().astype(np.float32).T
    np.testing.assert_array_equal(tensor.read()[0], want)
    shard = (slice(0, 1), slice(300, 900), slice(7, 1400))
    np.testing.assert_array_equal(tensor.read(shard)[0], want[300:900, 7:])


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
def test_put_sees_every_path_and_may_read_any_shard(folder, layer_loop) -> None:
    seen = {}

    def put(path, tensor):
        seen[path] = tensor.axes
        whole = np.asarray(put_on_first_device(path, tensor))
        index = tuple(slice(size // 4, size // 2) for size in tensor.shape)
        if tensor.axes[0] == "L":
            index = (slice(1, 2), *index[1:])
        if set("UY") & set(tensor.axes):  # a part of it is none of the whole: the test below
            index = (*index[:-2], slice(None), index[-1])
        np.testing.assert_array_equal(tensor.read(index), whole[index])
        return jnp.asarray(whole)

    params, _ = load(folder, layer_loop=layer_loop, put=put)
    assert len(seen) == len(jax.tree.leaves(params))
    assert seen["embed_VD"] == "VD"
    if layer_loop == "scan":
        assert seen["blocks.w_qkv_UD"] == "LUD"
    else:
        assert seen["blocks.1.w_qkv_UD"] == "UD"


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize("num_chips", [1, 2, 4])
def test_a_shard_of_joined_parameters_joins_their_shards(folder, layer_loop, num_chips) -> None:
    """4 query heads and 2 kv heads of 16: with 4 chips, each of these twice."""
    tensors = random_llama_tensors(SMALL_LLAMA, seed=0)
    at = "model.layers.1."
    q, k, v = (tensors[f"{at}self_attn.{name}_proj.weight"] for name in "qkv")
    if num_chips == 4:
        k, v = (np.repeat(w.reshape(2, 16, 64), 2, axis=0).reshape(64, 64) for w in (k, v))
    gate_up = [tensors[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    joined = {}  # of the last layer

    def put(path, tensor):
        joined[path.rsplit(".")[-1]] = tensor
        return put_on_first_device(path, tensor)

    load(folder, layer_loop=layer_loop, put=put, num_chips=num_chips)
    for leaf, parts in (("w_qkv_UD", (q, k, v)), ("w_gate_up_YD", gate_up)):
        tensor = joined[leaf]
        layers = (slice(1, 2),) if tensor.axes[0] == "L" else ()
        length = tensor.shape[-2] // num_chips
        for chip in range(num_chips):
            shard = slice(chip * length, (chip + 1) * length)
            got = tensor.read((*layers, shard, slice(None)))
            want = [np.split(w, num_chips)[chip] for w in parts]
            np.testing.assert_array_equal(got.reshape(length, -1), np.concatenate(want))
        with pytest.raises(AssertionError, match="not one of equal shards"):
            tensor.read((*layers, slice(0, 20), slice(None)))


def test_loading_straight_into_a_sharding(folder) -> None:
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Explicit,))

    def put(path, tensor):
        spec = ["tensor" if letter in "UYQCNKFV" else None for letter in tensor.axes]
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.make_array_from_callback(tensor.shape, sharding, tensor.read)

    params, _ = load(folder, layer_loop="scan", put=put)
    want, _ = load(folder, layer_loop="scan")
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert params["blocks"]["w_qkv_UD"].sharding.spec == jax.P(None, "tensor", None)


def test_tied_embeddings_have_no_unembedding(tmp_path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0, tie_word_embeddings=True)
    params, _ = load(folder)
    assert sorted(params) == ["blocks", "embed_VD", "final_norm_D"]


def test_harmless_extras_are_ignored(tmp_path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0, tie_word_embeddings=True)
    tensors = random_llama_tensors(SMALL_LLAMA, seed=0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.ones(8, np.float32)
    write_tensors(folder, tensors)
    params, report = load(folder)
    assert "lm_head_VD" not in params
    assert report.num_tensors == len(tensors) - 3


def test_extra_frequencies_of_a_layer_that_is_not_there_are_refused(folder) -> None:
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: np.ones(8, np.float32)}))
    with pytest.raises(CheckpointError, match=rf"none missing, 1 \({name}\) extra"):
        load(folder)


def test_missing_and_extra_tensors_are_listed_and_counted(folder) -> None:
    def change(tensors):
        for layer in range(2):
            for part in ("gate", "up", "down"):
                del tensors[f"model.layers.{layer}.mlp.{part}_proj.weight"]
        tensors["model.layers.0.mlp.router.weight"] = np.ones((2, 2), np.float32)

    rewrite(folder, change)
    with pytest.raises(
        CheckpointError,
        match=r"got 6 \(model\.layers\.0\.mlp\.gate_proj\.weight, .*, \.\.\.\) missing, "
        r"1 \(model\.layers\.0\.mlp\.router\.weight\) extra\. Use the config\.json",
    ):
        load(folder)


def test_mis_shaped_tensor_is_named(folder) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.ones(63, np.float32)}))
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight must .*implies, \(64,\); got shape=\(63,\)"
    ):
        load(folder)


def test_integer_weights_are_refused(folder) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.ones(64, np.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight must be stored.*dtype=int8"):
        load(folder)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_values_too_large_for_float16_are_not_made_infinite(tmp_path, stored) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0, dtype=stored)
    tensors = random_llama_tensors(SMALL_LLAMA, seed=0, dtype=stored)
    for name in ("model.norm.weight", "model.layers.1.self_attn.k_proj.weight"):
        spoiled = {**tensors, name: tensors[name].copy()}
        spoiled[name][3] = 1e6
        write_tensors(folder, spoiled)
        with pytest.raises(CheckpointError, match=r"got dtype=float16 .*Ask for bfloat16 or float"):
            load(folder, dtype="float16")


def test_report_is_a_start_up_line(folder) -> None:
    _, report = load(folder)
    assert str(report).startswith("loaded 21 tensors, 0.00 GB, in ")
    assert report.elapsed_s > 0


@pytest.mark.parametrize("dtype", ["int8", "fp32", "auto"])
def test_dtype_must_be_known(folder, dtype) -> None:
    with pytest.raises(ValueError, match=f"one of float32, float16, bfloat16; got dtype={dtype!r}"):
        load(folder, dtype=dtype)


def test_layer_loop_must_be_known(folder) -> None:
    with pytest.raises(ValueError, match="must be 'scan' or 'unrolled'; got layer_loop='loop'"):
        load(folder, layer_loop="loop")


def test_not_a_model_folder(tmp_path, folder) -> None:
    with pytest.raises(CheckpointError, match="absent', which does not exist"):
        read_model_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="which is a file"):
        read_model_config(folder / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="which has no config.json"):
        read_model_config(tmp_path / "empty")


def test_broken_config(folder) -> None:
    (folder / "config.json").write_text('{"architectures": [')
    with pytest.raises(CheckpointError, match="config.json is not JSON: "):
        read_model_config(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="config.json is not JSON: "):
        read_model_config(folder)
    write_json(folder / "config.json", ["LlamaForCausalLM"])
    with pytest.raises(CheckpointError, match="must hold a JSON object; got list"):
        read_model_config(folder)


def test_contradicting_config(tmp_path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0)
    write_json(folder / "config.json", {**SMALL_LLAMA, "num_key_value_heads": 3})
    with pytest.raises(CheckpointError, match="contradicts itself: num_q_heads must be a multiple"):
        read_model_config(folder)


def test_overrides_win_over_config_json(tmp_path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0)
    got = read_model_config(folder, overrides={"rope_theta": 5e5})
    assert got == replace(read_model_config(folder), rope_theta=5e5)
    with pytest.raises(ValueError, match=r"got 'rope_thet'\. Did you mean rope_theta\?"):
        read_model_config(folder, overrides={"rope_thet": 5e5})
    with pytest.raises(
        CheckpointError, match=r"^with hf_overrides={'rope_theta': 'x'}, config.json"
    ):
        read_model_config(folder, overrides={"rope_theta": "x"})
    with pytest.raises(CheckpointError, match=r"^with hf_overrides=.*contradicts itself"):
        read_model_config(folder, overrides={"num_key_value_heads": 3})
    with pytest.raises(NotImplementedError, match=r"^with hf_overrides=.*must be 'silu'"):
        read_model_config(folder, overrides={"hidden_act": "gelu"})


MEASURE = """
import sys
from pathlib import Path
import jax
from jinfer.weights.load import load_params, read_model_config

def status_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

folder, layer_loop, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.block_until_ready(jax.numpy.zeros(8))
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
before = status_bytes("VmRSS")
params, report = load_params(
    folder, read_model_config(folder), dtype=dtype, layer_loop=layer_loop
)
print(status_bytes("VmHWM") - before, report.param_bytes)
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """8 layers of 3.9 million parameters: 127 MB as stored, with no tensor above 3.2 MB."""
    return write_llama_checkpoint(
        tmp_path_factory.mktemp("large"),
        seed=0,
        shards=2,
        num_hidden_layers=8,
        hidden_size=768,
        intermediate_size=1024,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("layer_loop", "dtype"), [("unrolled", "bfloat16"), ("scan", "float32")])
def test_host_memory_never_holds_the_model_twice(large_folder, layer_loop, dtype) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_folder), layer_loop, dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    peak_bytes, param_bytes = map(int, result.stdout.split())
    largest_bytes = 1024 * 768 * 4
    # Beside the parameters: one tensor's mapped file, the tiles in flight, allocator slack.
    assert param_bytes > 15 * largest_bytes  # so that a second copy could not hide in the slack
    assert peak_bytes - param_bytes < 4 * largest_bytes, f"{peak_bytes=}, {param_bytes=}"
