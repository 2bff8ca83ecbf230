"""A program's name in the store: the function and every argument bound to it."""

from dataclasses import replace
from functools import partial

from jinfer.compile.program_key import bound_text
from jinfer.config import ModelConfig
from jinfer.models.decoder import Decoder
from jinfer.step.step import run_step

MODEL = ModelConfig(
    family="llama", vocab_size=256, hidden_size=32, intermediate_size=48, num_layers=1,
    num_q_heads=2, num_kv_heads=1, head_dim=16, max_position_embeddings=64,
    rms_norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


def step_of(model: ModelConfig) -> str | None:
    return bound_text(partial(run_step, decoder=Decoder(model), precision="default"))


def test_models_of_equal_shapes_do_not_share_programs() -> None:
    assert step_of(MODEL) == step_of(replace(MODEL)) is not None
    assert step_of(replace(MODEL, rope_theta=5e5)) != step_of(MODEL)
    assert step_of(replace(MODEL, rms_norm_eps=1e-6)) != step_of(MODEL)


def test_nested_bound_arguments_count() -> None:
    texts = {
        bound_text(partial(run_step, paged_attention=partial(run_step, tile_tokens=tokens)))
        for tokens in (1, 2)
    }
    assert len(texts) == 2 and None not in texts


def test_a_function_that_hides_what_it_computes_has_no_text() -> None:
    factor = 2

    def scaled(a: int) -> int:
        return a * factor

    assert bound_text(scaled) is None and bound_text(lambda a: a) is None
    assert bound_text(partial(run_step, decoder=object())) is None
    assert bound_text(MODEL.kv_bytes_per_token) is None
