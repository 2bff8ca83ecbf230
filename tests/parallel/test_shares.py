"""A model cut over chips: what is held, what one chip has, and what cannot be cut."""

import dataclasses

import pytest

from jinfer.config import ModelConfig
from jinfer.parallel.shares import chip_share, held_model

MODEL = ModelConfig(
    family="llama",
    vocab_size=1000,
    width=64,
    mlp_width=96,
    num_layers=2,
    num_q_heads=8,
    num_kv_heads=2,
    head_width=16,
    max_position=256,
    rms_eps=1e-5,
    rope_theta=10_000.0,
)


def test_one_chip_holds_the_model_as_it_is() -> None:
    assert held_model(MODEL, 1) == chip_share(MODEL, 1) == MODEL


@pytest.mark.parametrize(
    ("size", "held_kv_heads", "held_vocab"), [(2, 2, 1024), (4, 4, 1024), (8, 8, 1024)]
)
def test_kv_heads_are_repeated_and_the_vocabulary_filled_up(
    size: int, held_kv_heads: int, held_vocab: int
) -> None:
    held = held_model(MODEL, size)
    assert (held.num_kv_heads, held.vocab_size) == (held_kv_heads, held_vocab)
    share = chip_share(held, size)
    assert share.num_q_heads * size == 8 and share.mlp_width * size == 96
    assert share.num_kv_heads == held_kv_heads // size and share.vocab_size * size == held_vocab
    assert share.vocab_size % 128 == 0  # no block of the draw lies on two chips
    kept = {"width", "num_layers", "head_width", "max_position"}
    assert all(getattr(share, name) == getattr(MODEL, name) for name in kept)


def test_a_vocabulary_that_fits_is_not_filled_up() -> None:
    llama_3 = dataclasses.replace(MODEL, vocab_size=128_256)
    assert held_model(llama_3, 2).vocab_size == 128_256
    assert held_model(llama_3, 8).vocab_size == 129_024


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({}, 16, "must divide the model's num_attention_heads; got .*=16, num_attention_heads=8"),
        ({"mlp_width": 98}, 4, "must divide the model's intermediate_size; got .*_size=98. Choose"),
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
        held_model(dataclasses.replace(MODEL, **change), size)
