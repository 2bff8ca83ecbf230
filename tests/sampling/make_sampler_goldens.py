"""Distributions of Hugging Face's logits processors, for the sampler's tests to draw against.

Run with the `agreement` extra installed: python tests/sampling/make_sampler_goldens.py
Presence and frequency penalties, which transformers lacks, follow the OpenAI API reference.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.generation import logits_process as hf

GOLDENS = Path(__file__).parent / "sampler_goldens.json"
VOCAB = 200
STOP_IDS = [2, 131]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_k_1": {"temperature": 1.0, "top_k": 1},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_p_tiny": {"temperature": 1.0, "top_p": 0.01},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.6},
    "repetition_reward": {"temperature": 1.0, "repetition_penalty": 0.7},
    "presence": {"temperature": 1.0, "presence_penalty": 1.2},
    "frequency": {"temperature": 1.0, "frequency_penalty": 0.8},
    "bias": {"temperature": 1.0, "logit_bias": {"5": 4.0, "199": 5.5, "17": -100.0}},
    "allowed": {"temperature": 1.0, "allowed_ids": [0, 31, 32, 127, 128, 199]},
    "bad_words": {"temperature": 1.0, "bad_words": [[9], [40, 41, 3], [41, 64], [40, 8], [7, 12]]},
    "min_tokens": {"temperature": 1.0, "min_tokens": 100},
    "min_tokens_over": {"temperature": 1.0, "min_tokens": 3},
    "top_k_top_p_min_p": {"temperature": 1.3, "top_k": 40, "top_p": 0.85, "min_p": 0.04},
    "everything": {
        "temperature": 0.8,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {"2": 6.0, "77": 3.0, "64": 8.0},
        "bad_words": [[41, 64]],
        "min_tokens": 100,
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.02,
    },
}


def hf_probs(
    logits: np.ndarray, prompt_ids: list[int], output_ids: list[int], params: dict[str, Any]
) -> np.ndarray:
    """The distribution that transformers would draw the next token from."""
    scores = torch.tensor(logits, dtype=torch.float32)[None]
    whole = torch.tensor([prompt_ids + output_ids])
    output = torch.tensor([output_ids], dtype=torch.long)
    if "repetition_penalty" in params:
        scores = hf.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"])(whole, scores)
    count = torch.bincount(output[0], minlength=len(logits))
    scores = scores - params.get("frequency_penalty", 0.0) * count
    scores = scores - params.get("presence_penalty", 0.0) * (count > 0)
    for processor in _processors(params, len(prompt_ids)):
        # vLLM matches bad words against the output alone; the others do not look at the tokens.
        over_output = isinstance(processor, hf.NoBadWordsLogitsProcessor)
        scores = processor(output if over_output else whole, scores)
    return scores.softmax(-1)[0].double().numpy()


def _processors(params: dict[str, Any], prompt_length: int) -> list[hf.LogitsProcessor]:
    made: list[hf.LogitsProcessor] = []
    if bias := params.get("logit_bias"):
        made.append(hf.SequenceBiasLogitsProcessor([[[int(k)], v] for k, v in bias.items()]))
    if words := params.get("bad_words"):
        made.append(hf.NoBadWordsLogitsProcessor(words, eos_token_id=[0]))
    if allowed := params.get("allowed_ids"):
        made.append(hf.PrefixConstrainedLogitsProcessor(lambda *_: allowed, num_beams=1))
    if least := params.get("min_tokens"):
        made.append(hf.MinNewTokensLengthLogitsProcessor(prompt_length, least, STOP_IDS))
    made.append(hf.TemperatureLogitsWarper(params["temperature"]))
    if "top_k" in params:
        made.append(hf.TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        made.append(hf.TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        made.append(hf.MinPLogitsWarper(params["min_p"]))
    return made


def main() -> None:
    rng = np.random.default_rng(20)
    logits = np.round(rng.normal(size=VOCAB) * 2.0, 6)
    assert len(set(logits)) == VOCAB, (
        "which of two equal tokens top-p keeps is an accident of the sort"
    )
    prompt_ids = [int(i) for i in np.argsort(logits)[-40::4]] + [2, 3, 3, 199]
    output_ids = [11, 12, 12, 64, int(logits.argmax()), int(logits.argmax()), 12, 40, 41]
    cases = {}
    for name, params in CASES.items():
        probs = hf_probs(logits, prompt_ids, output_ids, params)
        cases[name] = {"params": params, "probs": [float(f"{p:.8g}") for p in probs]}
    golden = {"logits": logits.tolist(), "prompt_ids": prompt_ids, "output_ids": output_ids}
    GOLDENS.write_text(json.dumps({**golden, "stop_ids": STOP_IDS, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
