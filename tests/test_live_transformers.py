"""Against live transformers: `pytest -m agreement`, with the `agreement` extra installed."""

from pathlib import Path

import numpy as np
import pytest
from engine_runs import logprobs_of, make_engine, run_jobs, tokens_of
from hf_cases import (
    CASES,
    NUM_GREEDY_TOKENS,
    SHIPPED,
    SHIPPED_PROMPT,
    prompt_of,
    shipped_prompt_ids,
    write_case,
)

from jinfer.request.params import SamplingParams

pytestmark = [
    pytest.mark.agreement,
    # transformers' own, over which we have no say
    pytest.mark.filterwarnings("default"),
]
transformers = pytest.importorskip("transformers", reason="needs the agreement extra")
pytest.importorskip("torch", reason="needs the agreement extra")


def hugging_face_greedy(folder: Path, prompt_ids: list[int]) -> tuple[list[int], np.ndarray]:
    """The greedy continuation, and the logprob of each of its tokens."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        output = model.generate(
            ids,
            max_new_tokens=NUM_GREEDY_TOKENS,
            min_new_tokens=NUM_GREEDY_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0]
        logits = model(output[None]).logits[0].double()
    token_ids = output[len(prompt_ids) :]
    logprobs = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return token_ids.tolist(), logprobs[np.arange(len(token_ids)), token_ids].numpy()


def check(folder: Path, prompt_ids: list[int]) -> None:
    engine = make_engine(folder, max_num_seqs=1, max_num_batched_tokens=8, max_model_len=128)
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_GREEDY_TOKENS, ignore_eos=True, logprobs=0
    )
    [output] = run_jobs(engine, [(prompt_ids, params)])
    engine.close()
    token_ids, logprobs = hugging_face_greedy(folder, prompt_ids)
    assert tokens_of(output) == [token_ids]
    np.testing.assert_allclose(logprobs_of(output), logprobs, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_random_checkpoints(name: str, tmp_path: Path) -> None:
    check(write_case(tmp_path, name), prompt_of(name))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models(name: str) -> None:
    check(SHIPPED[name], shipped_prompt_ids(SHIPPED[name]))


def test_shipped_tokenizer() -> None:
    folder = SHIPPED["shipped_target"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(SHIPPED_PROMPT)["input_ids"] == shipped_prompt_ids(folder)
