"""The embedding and the lm_head: one matrix or two, as the files say and not config.json alone."""

import logging
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from random_checkpoint import (
    SMALL_LLAMA,
    random_llama_tensors,
    write_llama_checkpoint,
    write_tensors,
)

import jinfer.weights.embeddings
from jinfer.parallel.mesh import make_mesh
from jinfer.parallel.model_shards import padded_model
from jinfer.parallel.sharding import Placement
from jinfer.weights.convert import convert
from jinfer.weights.describe import describe
from jinfer.weights.layout import hold_as, put_held
from jinfer.weights.load import load_params, read_model_config
from jinfer.weights.orbax import ORBAX_FOLDER

EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
FORMATS = ["one file", "sharded", "orbax"]
SAID = "holds an lm_head of its own, which is used"


def tied_folder(
    tmp_path: Path, form: str = "one file", *, embed: Any = None, lm_head: Any = None
) -> Path:
    """A folder whose config.json says tied, with these matrices; those that are None are absent."""
    folder = write_llama_checkpoint(tmp_path / "hf", seed=0, tie_word_embeddings=True)
    (folder / "model.safetensors").unlink()
    tensors = random_llama_tensors({**SMALL_LLAMA, "tie_word_embeddings": True}, seed=0)
    tensors |= {EMBED: embed, LM_HEAD: lm_head}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_tensors(folder, tensors, shards=1 if form != "sharded" else 3)
    if form != "orbax":
        return folder
    convert(folder, tmp_path / "orbax")
    return tmp_path / "orbax"


def matrices() -> tuple[np.ndarray, np.ndarray]:
    tensors = random_llama_tensors(SMALL_LLAMA, seed=1)
    return tensors[EMBED], tensors[LM_HEAD]


def load(folder: Path) -> tuple[dict[str, Any], Any]:
    config = read_model_config(folder)
    params, _ = load_params(folder, config, dtype="float32", layer_loop="unrolled")
    return params, config


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logging.getLogger("jinfer"), "propagate", True)
    return caplog


@pytest.mark.parametrize("form", FORMATS)
def test_an_lm_head_of_its_own_is_used_with_a_line(tmp_path, form, said) -> None:
    embed, lm_head = matrices()
    folder = tied_folder(tmp_path, form, embed=embed, lm_head=lm_head)
    said.clear()
    params, config = load(folder)
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(params["embed_VD"], embed)
    np.testing.assert_array_equal(params["lm_head_VD"], lm_head)
    assert [SAID in line for line in said.messages] == [True]
    assert describe(folder).num_parameters == config.num_parameters


@pytest.mark.parametrize("form", FORMATS)
def test_an_equal_lm_head_stays_tied_in_silence(tmp_path, form, said) -> None:
    embed, _ = matrices()
    params, config = load(tied_folder(tmp_path, form, embed=embed, lm_head=embed.copy()))
    assert config.tie_word_embeddings and "lm_head_VD" not in params
    assert not said.messages


@pytest.mark.parametrize("form", FORMATS)
def test_the_one_matrix_may_have_the_name_of_the_lm_head(tmp_path, form, said) -> None:
    _, lm_head = matrices()
    params, config = load(tied_folder(tmp_path, form, lm_head=lm_head))
    assert config.tie_word_embeddings and "lm_head_VD" not in params
    np.testing.assert_array_equal(params["embed_VD"], lm_head)
    assert not said.messages


def test_an_orbax_tree_with_a_copy_of_the_embedding_stays_tied(tmp_path) -> None:
    """As saved by a trainer, with both leaves: `jinfer convert` writes one."""
    import orbax.checkpoint as ocp

    embed, _ = matrices()
    source = tied_folder(tmp_path, embed=embed)
    params, config = load(source)
    tree, _ = load_params(source, config, dtype="float32", layer_loop="unrolled", joined=False)
    folder = tmp_path / "tuned"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / ORBAX_FOLDER, {**tree, "lm_head_VD": tree["embed_VD"]})
    (folder / "config.json").write_text((source / "config.json").read_text())
    got, got_config = load(folder)
    assert got_config == config
    jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.parametrize("last", [-1, 70])
def test_one_number_makes_two_matrices(tmp_path, monkeypatch, last) -> None:
    """In any block of the comparison."""
    monkeypatch.setattr(jinfer.weights.embeddings, "BLOCK_BYTES", 10 * 64 * 4)  # 10 rows
    embed, _ = matrices()
    lm_head = embed.copy()
    lm_head[last, -1] += 1
    assert not read_model_config(
        tied_folder(tmp_path, embed=embed, lm_head=lm_head)
    ).tie_word_embeddings
    assert read_model_config(
        tied_folder(tmp_path / "same", embed=embed, lm_head=embed.copy())
    ).tie_word_embeddings


def test_dtypes_are_compared_by_value(tmp_path) -> None:
    embed, _ = matrices()
    rounded = embed.astype(ml_dtypes.bfloat16)
    folder = tied_folder(tmp_path, embed=rounded.astype(np.float32), lm_head=rounded)
    assert read_model_config(folder).tie_word_embeddings
    folder = tied_folder(tmp_path / "other", embed=embed, lm_head=rounded)
    assert not read_model_config(folder).tie_word_embeddings


def test_nan_equals_itself(tmp_path) -> None:
    embed, _ = matrices()
    embed[3, 4] = np.nan
    folder = tied_folder(tmp_path, embed=embed, lm_head=embed.copy())
    assert read_model_config(folder).tie_word_embeddings


@pytest.mark.parametrize("num_chips", [2, 4])
def test_shards_are_those_of_an_untied_folder(tmp_path, num_chips) -> None:
    embed, lm_head = matrices()
    params = []
    for tied in (True, False):
        folder = tied_folder(tmp_path / str(tied), embed=embed, lm_head=lm_head)
        config_path = folder / "config.json"
        config_path.write_text(
            config_path.read_text().replace(
                '"tie_word_embeddings": true', f'"tie_word_embeddings": {str(tied).lower()}'
            )
        )
        config = read_model_config(folder)
        hold = hold_as("default", Placement(make_mesh(jax.devices(), num_chips)).sharding)
        params.append(
            load_params(
                folder,
                config,
                dtype="float32",
                layer_loop="scan",
                padded=padded_model(config, num_chips),
                put=lambda path, tensor, hold=hold: put_held(path, tensor, hold=hold),
            )[0]
        )
    assert jax.tree.structure(params[0]) == jax.tree.structure(params[1])
    for one, other in zip(*map(jax.tree.leaves, params), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)


def test_config_json_alone_decides_without_weights(tmp_path) -> None:
    embed, lm_head = matrices()
    folder = tied_folder(tmp_path, embed=embed, lm_head=lm_head)
    assert read_model_config(folder, weights=False).tie_word_embeddings
    (folder / "model.safetensors").unlink()
    assert read_model_config(folder).tie_word_embeddings
