"""What is asked of an engine: lengths, prompts, arrivals."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinfer.bench.workload import (
    SHAREGPT_MEAN,
    SHAREGPT_RANGE,
    fitted,
    make_jobs,
    poisson_arrivals,
    read_trace,
    sharegpt_lengths,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "request"))
from data_folder import data_folder  # noqa: E402

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_sharegpt_lengths_have_the_means_they_claim() -> None:
    lengths = sharegpt_lengths(20_000, np.random.default_rng(0))
    means = np.mean(lengths, axis=0)
    # Cutting at 1024 takes a little off the top.
    assert means == pytest.approx(SHAREGPT_MEAN, rel=0.1) and all(means < SHAREGPT_MEAN)
    low, high = SHAREGPT_RANGE
    assert low <= np.min(lengths) and np.max(lengths) <= high
    assert lengths == sharegpt_lengths(20_000, np.random.default_rng(0))


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1),
    st.integers(2, 200),
)
def test_what_is_fitted_fits(lengths: list[tuple[int, int]], max_model_len: int) -> None:
    cut, num_cut = fitted(lengths, max_model_len)
    assert all(i >= 1 and o >= 1 and i + o <= max_model_len for i, o in cut)
    assert num_cut == sum(i + o > max_model_len for i, o in lengths)
    assert all(i <= i0 and o <= o0 for (i, o), (i0, o0) in zip(cut, lengths, strict=True))


def test_jobs_are_repeatable_and_share_what_they_should() -> None:
    def jobs(num_shared: int) -> list[tuple[int, ...]]:
        made = make_jobs(
            [(10, 3), (4, 2), (20, 1)],
            vocab_size=50,
            rng=np.random.default_rng(3),
            num_shared=num_shared,
        )
        assert [len(job.prompt_ids) for job in made] == [10, 4, 20]
        assert [job.num_output_tokens for job in made] == [3, 2, 1]
        assert all(3 <= token < 50 for job in made for token in job.prompt_ids)
        return [job.prompt_ids for job in made]

    assert jobs(6) == jobs(6)
    first, second, third = jobs(6)
    assert first[:6] == third[:6] and first[:4] == second and first[6:] != third[6:10]
    assert jobs(0)[0][:6] != jobs(0)[2][:6]


def test_poisson_arrivals_come_at_their_rate() -> None:
    arrivals = poisson_arrivals(10_000, 4.0, np.random.default_rng(0))
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)
    assert 10_000 / arrivals[-1] == pytest.approx(4.0, rel=0.05)


def test_a_trace_keeps_its_times_and_is_scaled(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,1\n"
    text = HEADER + rows + "2023-11-16 18:16:00.0000000,1,1\n"
    file.write_text(text, encoding="utf-8-sig")  # as spreadsheets save it
    lengths, arrivals = read_trace(file, 2, 0.25)
    assert lengths == [(94, 11), (99, 1)]
    assert arrivals == pytest.approx([0.0, 4.314579], abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "must be a CSV file with the columns TIMESTAMP"),
        (HEADER + "now,1,2\n", "must be a CSV file"),
        (HEADER + "2023-11-16 18:15:46.6805900,374\n", "must be a CSV file"),
        (HEADER, "must hold requests; got none"),
    ],
)
def test_a_wrong_trace_is_told(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_trace(file, 10, 1.0)
    with pytest.raises(ValueError, match="must be a CSV file"):
        read_trace(tmp_path / "none.csv", 10, 1.0)


def test_the_azure_traces_are_read() -> None:
    folder = data_folder("traces") / "azure-llm-2023"
    lengths, arrivals = read_trace(folder / "AzureLLMInferenceTrace_conv.csv", 100, 1.0)
    assert len(lengths) == 100 and lengths[0] == (374, 44)
    assert arrivals == sorted(arrivals) and arrivals[0] == 0
