"""What `jinfer info` will print."""

import numpy as np
import pytest
from random_checkpoint import (
    SMALL_LLAMA,
    random_llama_tensors,
    write_llama_checkpoint,
    write_tensors,
)

from jinfer.errors import CheckpointError
from jinfer.weights.describe import ModelDescription, describe


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_describes_a_checkpoint(tmp_path, tied, bias) -> None:
    hf = {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    folder = write_llama_checkpoint(tmp_path, seed=0, shards=2, dtype="bfloat16", **hf)
    tensors = random_llama_tensors({**SMALL_LLAMA, **hf}, seed=0)
    assert describe(folder) == ModelDescription(
        architecture="LlamaForCausalLM",
        family="llama",
        num_parameters=sum(tensor.size for tensor in tensors.values()),
        file_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        stored_dtypes={"bfloat16": len(tensors)},
        max_position_embeddings=256,
        kv_bytes_per_token={"float32": 2 * 2 * 2 * 16 * 4, "bfloat16": 2 * 2 * 2 * 16 * 2},
        tokenizer="none",
        eos_token_ids=(2,),
    )


def test_several_dtypes_are_counted(tmp_path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0)
    tensors = random_llama_tensors(SMALL_LLAMA, seed=0)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    write_tensors(folder, tensors)
    assert describe(folder).stored_dtypes == {"float32": 20, "float16": 1}


def test_tokenizer_kind(tmp_path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0)
    (folder / "tokenizer.model").touch()
    assert describe(folder).tokenizer == "sentencepiece"
    (folder / "tokenizer.json").touch()
    assert describe(folder).tokenizer == "tokenizers"


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=0)
    tensors = random_llama_tensors(SMALL_LLAMA, seed=0)
    del tensors["lm_head.weight"]
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=r"1 \(lm_head\.weight\) missing"):
        describe(folder)
