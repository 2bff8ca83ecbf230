"""What config.json of a Llama means, in every generation of the format."""

import pytest
from random_checkpoint import SMALL_LLAMA, llama_tensor_shapes

from jinfer.config import ModelConfig, RopeScaling
from jinfer.errors import CheckpointError
from jinfer.models import llama
from jinfer.models.registry import FAMILIES, FAMILY_OF_ARCHITECTURE, family_of

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SCALING = RopeScaling(
    kind="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def parse(**overrides) -> ModelConfig:
    hf = {**SMALL_LLAMA, **overrides}
    return llama.config_from_hf({key: value for key, value in hf.items() if value is not ...})


def test_every_field_comes_from_its_key() -> None:
    got = parse(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_theta=5e5)
    assert got == ModelConfig(
        family="llama",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )


def test_first_llamas_lack_the_later_keys() -> None:
    later = ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias")
    got = parse(**dict.fromkeys((*later, "tie_word_embeddings", "rope_theta", "rope_scaling"), ...))
    assert (got.num_kv_heads, got.head_dim, got.rope_theta) == (4, 16, 10_000.0)
    assert (got.attention_bias, got.mlp_bias, got.tie_word_embeddings) == (False, False, False)
    assert got.rope_scaling is None


def test_null_counts_as_absent_where_absence_is_allowed() -> None:
    assert parse(head_dim=None, num_key_value_heads=None).num_kv_heads == 4


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 7.0}, 7.0, None),
        ({"rope_theta": 7, "rope_scaling": {"rope_type": "default"}}, 7.0, None),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            7.0,
            RopeScaling(kind="linear", factor=2.0),
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, 5e5, LLAMA3_SCALING),
        (
            {"rope_theta": ..., "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
            7.0,
            None,
        ),
        (
            {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}},
            7.0,
            None,
        ),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 7.0}}, 7.0, None),
        (
            {"rope_theta": ..., "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
            5e5,
            LLAMA3_SCALING,
        ),
        (
            # transformers 5 saving a configuration that came with the old spelling
            {
                "rope_theta": ...,
                "rope_parameters": {
                    "factor": 2.0,
                    "rope_theta": 7.0,
                    "rope_type": "linear",
                    "type": "linear",
                },
            },
            7.0,
            RopeScaling(kind="linear", factor=2.0),
        ),
    ],
)
def test_rope_in_both_generations(rope, theta, scaling) -> None:
    got = parse(**rope)
    assert (got.rope_theta, got.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
    ],
)
def test_missing_key_is_named(key) -> None:
    with pytest.raises(
        CheckpointError, match=f"config.json must have {key}; got only .* and .* more"
    ):
        parse(**{key: ...})


def test_rope_parameters_without_a_theta_are_not_guessed() -> None:
    with pytest.raises(CheckpointError, match="config.json must have rope_theta"):
        parse(rope_theta=..., rope_parameters={"rope_type": "default"})


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "original_max_position_embeddings"])
def test_missing_rope_key_is_named(key) -> None:
    rope = {name: value for name, value in LLAMA3_ROPE.items() if name != key}
    with pytest.raises(CheckpointError, match=f"config.json must have {key}"):
        parse(rope_scaling=rope)


def test_rope_scaling_without_a_kind_is_not_guessed() -> None:
    with pytest.raises(CheckpointError, match="config.json must have rope_type; got only factor"):
        parse(rope_scaling={"factor": 2.0})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("hidden_size", "64", "a positive int"),
        ("num_attention_heads", 0, "a positive int"),
        ("num_hidden_layers", True, "a positive int"),
        ("rms_norm_eps", "1e-5", "a positive, finite float"),
        ("rms_norm_eps", 0.0, "a positive, finite float"),
        ("rope_theta", float("nan"), "a positive, finite float"),
        ("tie_word_embeddings", 1, "a bool"),
        ("rope_scaling", "linear", "a dict"),
    ],
)
def test_wrong_type_is_named(key, value, kind) -> None:
    with pytest.raises(CheckpointError, match=f"give {key} as {kind}; got {key}={value!r}"):
        parse(**{key: value})


def test_llama3_factors_must_be_in_order() -> None:
    with pytest.raises(CheckpointError, match="low_freq_factor below .*; got 4.0 and 4.0. Correct"):
        parse(rope_scaling={**LLAMA3_ROPE, "low_freq_factor": 4.0, "high_freq_factor": 4.0})


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_unsupported_rope_type_is_named(kind) -> None:
    with pytest.raises(NotImplementedError, match=f"rope_type={kind!r}"):
        parse(rope_scaling={"rope_type": kind, "factor": 2.0})


def test_partial_rotation_is_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    with pytest.raises(NotImplementedError, match=r"partial_rotary_factor=0\.5"):
        parse(rope_parameters=rope)


def test_other_activations_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="must be 'silu'; got hidden_act='gelu'"):
        parse(hidden_act="gelu")


def test_quantized_weights_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="method='awq' in quantization_config"):
        parse(quantization_config={"quant_method": "awq", "bits": 4})


def test_registry_knows_the_architecture() -> None:
    family = family_of(SMALL_LLAMA)
    assert family is FAMILIES[family.config_from_hf(SMALL_LLAMA).family]


def test_unsupported_architecture_is_named_beside_the_supported() -> None:
    with pytest.raises(
        NotImplementedError,
        match=r"architectures\[0\]='BertModel'. Supported: LlamaForCausalLM",
    ):
        family_of({"architectures": ["BertModel"]})
    assert "LlamaForCausalLM" in FAMILY_OF_ARCHITECTURE


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", [None]])
def test_architecture_must_be_named(value) -> None:
    with pytest.raises(CheckpointError, match="must name its architecture; got architectures="):
        family_of({"architectures": value})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_map_covers_exactly_the_stored_tensors(tied, bias) -> None:
    hf = {**SMALL_LLAMA, "tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    config = llama.config_from_hf(hf)
    weights = llama.weight_map(config)
    stored = list(weights.stored_tensors(config.num_layers))
    want = llama_tensor_shapes(hf)
    assert {tensor.name: weights.stored_shape(tensor) for tensor in stored} == want
    assert len(stored) == len(want)
