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


# The bases and scalings that transformers 5.24 computes with (LlamaRotaryEmbedding.inv_freq).
@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_theta": 7.0, "rope_scaling": {"rope_theta": 5e5, "type": "default"}}, 5e5, None),
        ({"rope_scaling": {**LLAMA3_ROPE, "rope_theta": 5e5}}, 5e5, LLAMA3_SCALING),
        ({"rope_theta": 7.0, "rope_scaling": {"rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default"}}, 10_000.0, None),
        ({"rope_theta": 7.0, "rope_scaling": {}, "rope_parameters": {}}, 7.0, None),
        (
            {"rope_theta": 7.0, "rope_scaling": {}, "rope_parameters": {"rope_theta": 9.0}},
            9.0,
            None,
        ),
        (
            {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 7.0}},
            7.0,
            RopeScaling(kind="linear", factor=2.0),
        ),
        (
            {
                "rope_theta": 7.0,
                "original_max_position_embeddings": 8192,
                "rope_scaling": {
                    key: value for key, value in LLAMA3_ROPE.items() if not key.startswith("orig")
                },
            },
            7.0,
            LLAMA3_SCALING,
        ),
    ],
)
def test_base_beside_or_inside_the_scaling(rope, theta, scaling) -> None:
    got = parse(**{"rope_theta": ..., **rope})
    assert (got.rope_theta, got.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("rope", "theta", "kind"),
    [
        ({"rope_theta": 7.0, "rope_scaling": {"rope_type": "default", "rope_theta": None}}, 7.0, 0),
        ({"rope_theta": None, "rope_scaling": {"rope_type": None}}, 10_000.0, 0),
        (
            {"rope_theta": 7, "rope_scaling": {"rope_type": None, "type": "linear", "factor": 2}},
            7.0,
            "linear",
        ),
        (
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "default", "beta_fast": None}},
            7.0,
            0,
        ),
    ],
)
def test_null_counts_as_absent_in_rope_mappings(rope, theta, kind) -> None:
    got = parse(**rope)
    assert (got.rope_theta, got.rope_scaling and got.rope_scaling.kind) == (theta, kind or None)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "default", "factor": 2.0}, "'default' uses; got factor=2.0"),
        ({"factor": 2.0}, "'default' uses; got factor=2.0"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 32}, "'linear' uses; got beta_fast=32"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, r"got mrope_section=\[1, 2\]"),
        ({**LLAMA3_ROPE, "attention_factor": 0.5}, "'llama3' uses; got attention_factor=0.5"),
        ({"rope_type": "default", "theta": 7.0}, "got theta=7.0. Correct rope_type .* or remove"),
    ],
)
def test_a_rope_key_that_is_not_used_is_refused(name, rope, said) -> None:
    with pytest.raises(CheckpointError, match=f"{name} must hold only what rope_type=.*{said}"):
        parse(**{name: rope})


def test_rope_keys_that_change_nothing_are_accepted() -> None:
    ones = {"factor": 1.0, "attention_factor": 1, "partial_rotary_factor": 1.0}
    assert parse(rope_scaling={"rope_type": "default", **ones}).rope_scaling is None


def test_rope_mappings_that_contradict_each_other() -> None:
    with pytest.raises(CheckpointError, match="one of rope_scaling and rope_parameters, or both "):
        parse(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 7.0})
    with pytest.raises(CheckpointError, match="one type; got rope_type='default', type='linear'"):
        parse(rope_scaling={"rope_type": "default", "type": "linear", "factor": 2.0})
    with pytest.raises(CheckpointError, match="once; got 64 at the top level and 8192 in rope_s"):
        parse(original_max_position_embeddings=64, rope_scaling=LLAMA3_ROPE)
    alike = {"rope_type": "default", "rope_theta": 7.0}
    assert parse(rope_scaling=alike, rope_parameters=alike).rope_theta == 7.0


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_that_differs_by_layer_is_refused(name) -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}
    with pytest.raises(NotImplementedError, match=f"{name} must hold for all layers; got full_a"):
        parse(**{name: rope})


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "original_max_position_embeddings"])
def test_missing_rope_key_is_named(key) -> None:
    rope = {name: value for name, value in LLAMA3_ROPE.items() if name != key}
    with pytest.raises(CheckpointError, match=f"config.json must have {key}"):
        parse(rope_scaling=rope)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("hidden_size", "64", "a positive int"),
        ("num_attention_heads", 0, "a positive int"),
        ("num_hidden_layers", True, "a positive int"),
        ("rms_norm_eps", "1e-5", "a positive, finite float"),
        ("rms_norm_eps", 0.0, "a positive, finite float"),
        ("rope_theta", float("nan"), "a positive, finite float"),
        ("rope_theta", "10000.0", "a positive, finite float"),
        ("head_dim", "16", "a positive int"),
        ("num_key_value_heads", "2", "a positive int"),
        ("vocab_size", "128", "a positive int"),
        ("max_position_embeddings", "4096", "a positive int"),
        ("num_hidden_layers", 2.0, "a positive int"),
        ("tie_word_embeddings", "false", "a bool"),
        ("attention_bias", "true", "a bool"),
        ("tie_word_embeddings", 1, "a bool"),
        ("rope_scaling", "linear", "a dict"),
    ],
)
def test_wrong_type_is_named(key, value, kind) -> None:
    with pytest.raises(CheckpointError, match=f"give {key} as {kind}; got {key}={value!r}"):
        parse(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("factor", "32.0", "a positive, finite float"),
        ("rope_theta", "500000.0", "a positive, finite float"),
        ("original_max_position_embeddings", "8192", "a positive int"),
        ("rope_type", 3, "a str"),
    ],
)
def test_wrong_type_in_a_rope_mapping_is_named(key, value, kind) -> None:
    with pytest.raises(CheckpointError, match=f"give {key} as {kind}; got {key}={value!r}"):
        parse(rope_scaling={**LLAMA3_ROPE, key: value})


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
    with pytest.raises(NotImplementedError, match=r"partial_rotary_factor=0\.5"):
        parse(partial_rotary_factor=0.5)


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
