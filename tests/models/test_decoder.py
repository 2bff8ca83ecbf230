"""The decoder gives Hugging Face's logits, whichever way its layer loop is driven."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_cases import CASES, GOLDENS, SHIPPED, prompt_of, shipped_prompt_ids, write_case

from jinfer.models.decoder import Decoder
from jinfer.weights.load import load_params, read_model_config
from kernels_pallas.paged_attention.xla import paged_attention_xla


def all_logits(folder: Path, token_ids: list[int], layer_loop: str) -> np.ndarray:
    """Logits [T, V] of one sequence, in shuffled pages of 16."""
    config = read_model_config(folder)
    params, _ = load_params(folder, config, dtype="float32", layer_loop=layer_loop)
    decoder = Decoder(config)
    num_tokens = len(token_ids)
    shape = (config.num_layers, 8, config.num_kv_heads, 16, 2 * config.head_dim)

    def attend(q_TNH, k_TKH, v_TKH, pages, layer):
        return paged_attention_xla(
            q_TNH,
            k_TKH,
            v_TKH,
            pages,
            layer,
            jnp.array([[3, 1, 5, 2]]),
            jnp.array([num_tokens]),
            jnp.array([0]),
            jnp.array([num_tokens]),
            scale=config.head_dim**-0.5,
        )

    @jax.jit
    def run(params, token_T):
        hidden_TD, _ = decoder.hidden(
            params, token_T, jnp.arange(num_tokens), attend, jnp.zeros(shape)
        )
        return decoder.logits(params, hidden_TD)

    return np.asarray(run(params, jnp.array(token_ids)))


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_hugging_face(name: str, layer_loop: str, tmp_path: Path) -> None:
    folder = write_case(tmp_path, name)
    got = all_logits(folder, prompt_of(name), layer_loop)
    want = np.load(GOLDENS)[f"{name}/logits"]
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_equals_hugging_face(name: str) -> None:
    got = all_logits(SHIPPED[name], shipped_prompt_ids(SHIPPED[name]), "unrolled")
    np.testing.assert_allclose(got[-1], np.load(GOLDENS)[f"{name}/logits"], atol=1e-4, rtol=0)
