"""Writes hf_goldens.npz from live transformers: `python tests/models/make_hf_goldens.py`.

Needs the `agreement` extra. Per case: the float32 logits of every prompt position, and the
greedy continuation with no end token. For the shipped models: the logits of the last prompt
position and the greedy continuation. Run it again when a shipped model changes.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from hf_cases import (  # noqa: E402
    CASES,
    GOLDENS,
    NUM_GREEDY_TOKENS,
    SHIPPED,
    prompt_of,
    shipped_prompt_ids,
    write_case,
)


def hugging_face_answer(folder: Path, prompt_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits [40, V] float32 and the greedy token ids [64] of one checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
        output = model.generate(
            ids,
            max_new_tokens=NUM_GREEDY_TOKENS,
            min_new_tokens=NUM_GREEDY_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return logits.astype(np.float32), output[0, len(prompt_ids) :].numpy().astype(np.int32)


def main() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in CASES:
            folder = write_case(Path(scratch), name)
            logits, greedy = hugging_face_answer(folder, prompt_of(name))
            arrays[f"{name}/logits"] = logits
            arrays[f"{name}/greedy"] = greedy
    for name, folder in SHIPPED.items():
        logits, greedy = hugging_face_answer(folder, shipped_prompt_ids(folder))
        arrays[f"{name}/logits"] = logits[-1]
        arrays[f"{name}/greedy"] = greedy
    np.savez_compressed(GOLDENS, **arrays)


if __name__ == "__main__":
    main()
