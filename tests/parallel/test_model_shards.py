"""A model cut over chips: what is held, what one chip has, and what cannot be cut."""

import dataclasses

import pytest

from jinfer.config import ModelConfig
from jinfer.parallel.model_shards import chip_shard, padded_model

MODEL = ModelConfig(
    family="llama",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
)


def test_one_chip_holds_the_model_as_it_is() -> None:
    assert padded_model(MODEL, 1) == chip_shard(MODEL, 1) == MODEL


@pytest.mark.parametrize(
    ("size", "padded_kv_heads", "padded_vocab"), [(2, 2, 1024), (4, 4, 1024), (8, 8, 1024)]
)
def test_kv_heads_are_repeated_and_the_vocabulary_filled_up(
    size: int, padded_kv_heads: int, padded_vocab: int
) -> None:
    padded = padded_model(MODEL, size)
    assert (padded.num_kv_heads, padded.vocab_size) == (padded_kv_heads, padded_vocab)
    shard = chip_shard(padded, size)
    assert shard.num_q_heads * size == 8 and shard.intermediate_size * size == 96
    assert shard.num_kv_heads == padded_kv_heads // size and shard.vocab_size * size == padded_vocab
    assert shard.vocab_size % 128 == 0  # no block of the draw lies on two chips
    kept = {"hidden_size", "num_layers", "head_dim", "max_position_embeddings"}
    assert all(getattr(shard, name) == getattr(MODEL, name) for name in kept)


def test_a_vocabulary_that_fits_is_not_filled_up() -> None:
    llama_3 = dataclasses.replace(MODEL, vocab_size=128_256)
    assert padded_model(llama_3, 2).vocab_size == 128_256
    assert padded_model(llama_3, 8).vocab_size == 129_024


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({}, 16, "must divide the model's num_attention_heads; got .*=16, num_attention_heads=8"),
        (
            {"intermediate_size": 98},
            4,
            "must divide the model's intermediate_size; got .*_size=98. Choose",
        ),
        (
            {"num_q_heads": 24, "num_kv_heads": 3},
            2,
            "num_key_value_heads or be a multiple of them; got .*=2, num_key_value_heads=3",
        ),
    ],
)
def test_what_cannot_be_cut_evenly_is_refused(
    change: dict[str, int], size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        padded_model(dataclasses.replace(MODEL, **change), size)
