"""Descriptions of model folders."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_checkpoint import write_llama_checkpoint


def test_info_of_a_checkpoint(run: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_llama_checkpoint(tmp_path / "model", seed=0, dtype="bfloat16")
    status, out, err = run("info", str(folder))
    assert (status, err) == (0, "")
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert lines["architecture"] == "LlamaForCausalLM (family llama)"
    assert lines["context"] == "256 tokens"
    assert "21 bfloat16" in lines["weights"] and lines["tokenizer"] == "none"
    assert lines["KV cache"].startswith("512 bytes per token in float32")
    said = json.loads(run("info", str(folder), "--json").out)
    assert said["model"] == str(folder) and said["stored_dtypes"] == {"bfloat16": 21}


def test_info_of_the_shipped_model(run: Callable[..., Any]) -> None:
    out = run("info").out
    assert out.startswith("model         fable\n") and "end tokens    2\n" in out
