"""A load is read from a trace as asked; the shared trace is read where it is there."""

import argparse
from pathlib import Path

import pytest

from jinfer.bench.pressure import read_load

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT / "shared/data/traces/azure-llm-2023/AzureLLMInferenceTrace_conv.csv"
ROWS = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46.6805900,3,2
2023-11-16 18:16:47.0000000,9,9
"""


def asked(**changes: float) -> argparse.Namespace:
    return argparse.Namespace(**{"requests": 3, "compress": 10.0, "divide": 8, **changes})


def test_clock_and_lengths_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(ROWS)
    load = read_load(path, asked(), vocab_size=100)
    assert [round(arrival.time_s, 3) for arrival in load] == [0.0, 0.431, 6.0]
    assert [len(arrival.prompt_ids) for arrival in load] == [46, 49, 1]
    assert [arrival.num_output_tokens for arrival in load] == [5, 13, 1]
    assert all(3 <= one < 100 for arrival in load for one in arrival.prompt_ids)


@pytest.mark.skipif(not TRACE.exists(), reason="needs the trace under shared/")
def test_the_shared_trace_is_such_a_load() -> None:
    load = read_load(TRACE, asked(requests=500), vocab_size=4096)
    times = [arrival.time_s for arrival in load]
    assert len(load) == 500 and times == sorted(times)
