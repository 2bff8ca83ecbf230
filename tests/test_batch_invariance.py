"""Within one program, a row computes the same to the bit whatever the other rows hold."""

from pathlib import Path

import numpy as np
import pytest
from engine_runs import Job, logprobs_of, make_engine, run_jobs, tokens_of
from random_checkpoint import write_llama_checkpoint

from jinfer.request.params import SamplingParams

NUM_ROWS = 8
PLACE = 3  # of the row that is watched; those before it outlive it, so it stays there
NUM_TOKENS = 24


def crowd(rng: np.random.Generator, num_after: int) -> list[Job]:
    """The watched job among others of random tokens, seeds, temperatures and lengths.

    Prompts are one token long, so that every dispatch is of the one program for 2 to 8 rows.
    """

    def other(num_tokens: int) -> Job:
        temperature, seed = rng.uniform(0.2, 1.5), int(rng.integers(1000))
        params = SamplingParams(
            max_tokens=num_tokens, ignore_eos=True, temperature=temperature, top_p=0.8, seed=seed
        )
        return [int(rng.integers(3, 128))], params

    watched = SamplingParams(
        max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.9, seed=5, logprobs=3
    )
    before = [other(NUM_TOKENS + int(rng.integers(1, 20))) for _ in range(PLACE)]
    after = [other(int(rng.integers(1, NUM_TOKENS))) for _ in range(num_after)]
    return [*before, ([17], watched), *after]


@pytest.mark.parametrize("max_decode_steps", [1, 8])
def test_a_row_is_bit_identical_whatever_the_others_hold(
    tmp_path: Path, max_decode_steps: int
) -> None:
    folder = write_llama_checkpoint(tmp_path, seed=4)
    engine = make_engine(
        folder,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=NUM_ROWS,
        max_decode_steps=max_decode_steps,
        enable_prefix_caching=False,
    )
    rng = np.random.default_rng(0)
    crowds = [crowd(rng, num_after) for num_after in (0, 2, 4, 4)]
    watched = [run_jobs(engine, jobs)[PLACE] for jobs in crowds]
    engine.close()
    for output in watched[1:]:
        assert tokens_of(output) == tokens_of(watched[0])
        np.testing.assert_array_equal(logprobs_of(output), logprobs_of(watched[0]))
