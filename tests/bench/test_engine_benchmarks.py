"""Each benchmark of an engine, from the command to its table and its JSON."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fast_compiles import FAST_COMPILES

from jinfer.bench.ceilings import Ceilings
from jinfer.bench.compare import WAYS
from jinfer.bench.plot import require_matplotlib
from jinfer.bench.runner import Recording, run_jobs
from jinfer.bench.table import WIDTH
from jinfer.cli import bench_compare, bench_engine, main
from jinfer.cli.bench_arguments import COMPARED_WAYS

SMALL = "--max-num-seqs 4 --max-num-batched-tokens 16 -q".split()
CEILINGS = Ceilings(copy_bytes_per_s=1e10, read_bytes_per_s=1e10, flops_per_s=1e11, dtype="float32")

Bench = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def bench(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """Runs a benchmark; returns its output and JSON. Measuring ceilings takes seconds: given."""
    monkeypatch.setattr(bench_engine, "measure_ceilings", lambda platform, dtype: CEILINGS)
    file = tmp_path / "figures.json"

    def bench(*words: str) -> tuple[str, dict[str, Any]]:
        assert main(["bench", *words, "--json", str(file)]) == 0
        out, err = capsys.readouterr()
        assert err == ""  # -q
        assert max(map(len, out.splitlines())) <= WIDTH
        return out, json.loads(file.read_text())

    return bench


def check_run(run: dict[str, Any], *, num_requests: int, num_input: int, num_output: int) -> None:
    """What holds for every run of an engine."""
    assert run["num_requests"] == num_requests
    assert (run["num_input_tokens"], run["num_output_tokens"]) == (num_input, num_output)
    assert run["num_late_compiles"] == 0
    assert 0 < run["device_busy"] <= 1 and 0 <= run["device_waited"] < 1
    assert 0 <= run["padding_waste"] < 1 and 0 <= run["kv_waste"] < 1
    assert 0 < run["roofline_share"]
    spreads = run["spreads"]
    assert 0 < spreads["TTFT"]["median"] <= spreads["end to end"]["p99"]
    assert run["output_tokens_per_s"] == pytest.approx(num_output / run["elapsed_s"])


def test_latency(bench: Bench) -> None:
    words = ["--batch-size", "2", "--input-tokens", "8", "--output-tokens", "6", "--repeats", "2"]
    out, figures = bench("latency", *words, *SMALL)
    [run] = figures["runs"]
    check_run(run, num_requests=4, num_input=32, num_output=24)
    assert "batch of 2, 2 times; 16 tokens in, 12 out" in out and "roofline: " in out
    assert figures["device"] == "cpu" and figures["plan"]["max_slots"] == 4
    assert figures["arguments"]["batch_size"] == 2 and figures["arguments"]["seed"] == 0


def test_every_run_is_held_against_the_rates_beside_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([1.0, 4.0, 2.0])  # before, between and after two runs

    def measure(platform: str, dtype: str) -> Ceilings:
        rate = next(measured) * 1e9
        return Ceilings(
            copy_bytes_per_s=rate, read_bytes_per_s=rate, flops_per_s=1e15, dtype="float32"
        )

    monkeypatch.setattr(bench_engine, "measure_ceilings", measure)
    words = ["--input-tokens", "8", "--output-tokens", "6", "--repeats", "2"]
    _, figures = bench("latency", *words, *SMALL)
    [run] = figures["runs"]
    assert next(measured, None) is None
    roofline = run["roofline"]
    assert roofline["ceilings"]["read_bytes_per_s"] == 4e9
    assert roofline["bound_s"] == pytest.approx(roofline["num_bytes"] / 4e9)


def test_throughput(bench: Bench) -> None:
    words = ["--workload", "shared-prefix", "--shared-tokens", "32", "--input-tokens", "40"]
    out, figures = bench(
        "throughput", *words, "--num-prompts", "2", "6", "--output-tokens", "5", *SMALL
    )
    few, many = figures["runs"]
    check_run(few, num_requests=2, num_input=80, num_output=10)
    check_run(many, num_requests=6, num_input=240, num_output=30)
    assert few["num_cached_tokens"] == 32  # the second's; the first computes what is shared
    assert many["num_cached_tokens"] >= 5 * 32  # all but the first
    assert "shared-prefix, 6 requests, all at the start" in out


def test_serve_with_a_limit_on_concurrency(bench: Bench) -> None:
    words = ["--num-prompts", "6", "--input-tokens", "8", "--output-tokens", "4"]
    out, figures = bench("serve", *words, "--max-concurrency", "2", "--hf-token", "secret", *SMALL)
    [run] = figures["runs"]
    check_run(run, num_requests=6, num_input=48, num_output=24)
    assert run["max_concurrency"] == 2 and "concurrency             2  requests at most" in out
    assert "fixed, 6 requests, all at the start, 2 at most at once;" in out
    assert figures["arguments"]["hf_token"] == "given"
    # Times count from the moment when there is a place: nobody waits for the four before it.
    spreads = run["spreads"]
    assert spreads["end to end"]["p99"] < 0.9 * run["elapsed_s"]
    assert 0 <= spreads["queue"]["p90"] <= spreads["queue"]["p99"]


def test_serve_from_a_trace(bench: Bench, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,36,8\n"
        "2023-11-16 18:15:46.7805900,20,16\n2023-11-16 18:15:47.1805900,9,4\n"
    )
    words = ["--workload", "trace", "--trace", str(trace), "--scale", "0.5", "--num-prompts", "3"]
    targets = ["--ttft-target-ms", "60000", "--tpot-target-ms", "60000"]
    out, figures = bench("serve", *words, *targets, *SMALL)
    [run] = figures["runs"]
    assert run["num_good"] == 3 and "goodput            100.0 %  of requests within TTFT" in out
    check_run(run, num_requests=3, num_input=32, num_output=14)
    assert run["elapsed_s"] > 0.5  # the last one arrives then
    assert "as in the trace; 32 tokens in, 14 out" in out


def test_startup(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # It starts processes of its own.
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {FAST_COMPILES}")
    sizes = "--max-num-seqs 1 --max-num-batched-tokens 8 --max-decode-steps 1 -q".split()
    out, figures = bench("startup", *sizes)
    cold, warm = figures["cold"], figures["warm"]
    assert cold["num_read"] == 0 < cold["num_compiled"]
    assert warm["num_compiled"] == 0 and warm["num_read"] == cold["num_compiled"]
    assert (
        set(cold["program_s"]) == set(warm["program_s"])
        and "prompts, up to 8 tokens at once" in out
    )
    assert cold["weights_bytes"] > 0 and out.startswith("cpu; ")


@pytest.mark.slow
def test_startup_for_a_chip_that_is_not_here(bench: Bench) -> None:
    pytest.importorskip("libtpu", reason='the TPU compiler is not here; pip install "jax[tpu]"')
    sizes = "--max-num-seqs 1 --max-num-batched-tokens 8 --max-decode-steps 1 -q".split()
    out, figures = bench("startup", "--target", "v6e", *sizes)
    cold, warm = figures["cold"], figures["warm"]
    assert set(cold["temp_bytes"]) == set(cold["program_s"]) == set(warm["program_s"])
    assert warm["temp_bytes"] == {}  # each was found, and none compiled again
    assert warm["processor_s"] < cold["processor_s"]
    assert "fable for v6e" in out and "processor time" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("throughput --workload trace", "go together; got --workload trace, --trace None"),
        ("serve --trace a.csv", "go together; got --workload fixed, --trace a.csv"),
        ("latency --data-parallel-size 2 --profile a", "one replica; got data_parallel_size=2"),
        ("throughput --repeats 2", "--repeats does nothing without --compare; got --repeats 2"),
        ("throughput --compare --profile a", "--profile does nothing with --compare"),
        ("kernels --target v6e --profile a", "--profile needs kernels that run; got --profile a"),
        (
            "throughput --workload trace --trace a --scale 0",
            r"--scale must be above 0 and finite; got 0.0",
        ),
        (
            "serve --workload trace --trace a --scale inf",
            r"--scale must be above 0 and finite; got inf",
        ),
        ("throughput --workload trace --trace /no/such", "--trace must be a CSV file"),
        ("throughput --scale 2", "--scale does nothing with --workload fixed; got --scale 2.0"),
        ("serve --shared-tokens 8", "--shared-tokens does nothing with --workload fixed"),
        ("serve --workload sharegpt --input-tokens 8", "--input-tokens does nothing with"),
        (
            "throughput --workload shared-prefix --shared-tokens 8 --input-tokens 8",
            "--shared-tokens must be below --input-tokens",
        ),
        ("throughput --workload poem", "invalid choice: 'poem'"),
        ("serve --goodput ttft=5", "--goodput takes ttft, tpot and e2el"),
        ("serve --rate -1", r"--rate must be above 0; got -1.0"),
        ("serve --rate nan", r"--rate must be above 0; got nan"),
        ("serve --max-concurrency 0", r"an integer of at least 1; got '0'"),
        ("latency --profile /proc/trace", "needs a folder that can be written; got '/proc/trace'"),
        ("latency --batch-size 0", "an integer of at least 1; got '0'"),
        ("startup --compilation-cache /x", "startup makes a folder of its own"),
        ("startup --target v99", "got 'v99'. Choose one of these."),
        ("latency --model /no/such -q", "got model='/no/such'"),
        ("latency --plot /no/such/file.png", "can be written; got '/no/such/file.png'"),
    ],
)
def test_bad_input(
    words: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(bench_engine, "measure_ceilings", lambda platform, dtype: CEILINGS)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_only_compiles_leaves_no_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("jinfer.cli.bench_kernels.default_target", lambda: "v6e")
    assert main(["bench", "kernels", "--profile", str(tmp_path / "a")]) == 2
    assert "where they are only compiled, for v6e" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_what_is_not_installed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jinfer.bench.plot.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs matplotlib; got .* pip install"):
        require_matplotlib("a.png")
    monkeypatch.setitem(sys.modules, "torch", None)
    # Before an engine is made: there is no such model.
    assert main("bench throughput --compare --model nowhere".split()) == 2
    assert "--compare needs torch and transformers; got " in capsys.readouterr().err


def test_plot(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='no matplotlib here; pip install "jinfer[bench]"')
    words = ["--num-prompts", "3", "--input-tokens", "8", "--output-tokens", "5"]
    picture = tmp_path / "picture.png"
    bench("throughput", *words, "--plot", str(picture), *SMALL)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"--plot draws .*png.*; got 'a\.txt'"):
        require_matplotlib("a.txt")


def test_compared_ways_are_those_there_are() -> None:
    assert [way.replace("-", " ") for way in COMPARED_WAYS] == list(WAYS)


def test_a_plot_is_of_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason='no matplotlib here; pip install "jinfer[bench]"')
    assert main("bench throughput --num-prompts 1 4 --plot a.png".split()) == 2
    assert "--plot draws one run; got --num-prompts 1 4" in capsys.readouterr().err


def test_no_turn_of_a_comparison_finds_what_an_earlier_one_computed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = []

    @contextmanager
    def other(folder: Path, ways: list[str], **_: Any) -> Iterator[dict[str, Any]]:
        assert ways == ["generate"]
        yield {"other": lambda jobs: None}

    def run(*args: Any, **keywords: Any) -> Recording:
        recording = run_jobs(*args, **keywords)
        recordings.append(recording)
        return recording

    monkeypatch.setattr(bench_compare, "require_transformers", lambda: None)
    monkeypatch.setattr(bench_compare, "transformers_runs", other)
    monkeypatch.setattr(bench_compare, "run_jobs", run)
    plots = []
    monkeypatch.setattr(bench_engine, "require_matplotlib", lambda path: None)
    monkeypatch.setattr(bench_engine, "plot", lambda *args, **kw: plots.append((*args, kw)))
    # Before and after each of jinfer's turns, of which the first does not count.
    rates = iter([9e9, 9e9, 1e9, 4e9, 2e9, 1e9, 1e9, 1e9])
    monkeypatch.setattr(
        bench_engine,
        "measure_ceilings",
        lambda *_: replace(CEILINGS, copy_bytes_per_s=1e9, read_bytes_per_s=next(rates)),
    )
    words = ["--num-prompts", "2", "--input-tokens", "40", "--output-tokens", "2"]
    out, figures = bench("throughput", *words, "--compare", "generate", "--plot", "a.png", *SMALL)
    assert [recording.num_cached_tokens for recording in recordings] == [0] * 4
    [row] = figures["compared"]
    assert row["num_input_tokens"] == 80 and len(row["turns_s"]["jinfer"]) == 3
    # The table and the roofline are jinfer's, over the turns that count.
    [told] = figures["runs"]
    assert told["num_requests"] == 6 and told["num_cached_tokens"] == 0
    assert told["elapsed_s"] == sum(recording.elapsed_s for recording in recordings[1:])
    assert told["elapsed_s"] <= sum(row["turns_s"]["jinfer"])
    assert next(rates, None) is None
    assert told["roofline"]["ceilings"]["read_bytes_per_s"] == 4e9
    num_bytes = [sum(step.num_bytes for step in recording.steps) for recording in recordings[1:]]
    bounds_s = [size / rate for size, rate in zip(num_bytes, [4e9, 2e9, 1e9], strict=True)]
    assert told["roofline"]["read_bound_s"] == pytest.approx(sum(bounds_s), rel=0.01)
    assert figures["arguments"]["compare"] == ["generate"]
    # The others' turns lie between jinfer's, so only one of these is drawn.
    [(drawn, path, titled)] = plots
    assert drawn == recordings[-1:] and path == "a.png"
    assert titled["title"].endswith("; jinfer's last turn")
    assert "fixed, 2 requests" in out and "; jinfer, 3 turns\n" in out
    assert out.index("roofline: ") < out.index("prompts  jinfer")


@pytest.mark.agreement
def test_compare(bench: Bench) -> None:
    words = ["--num-prompts", "1", "3", "--input-tokens", "8", "--output-tokens", "4"]
    out, figures = bench("throughput", "--compare", "--repeats", "1", *words, *SMALL)
    assert [row["num_prompts"] for row in figures["compared"]] == [1, 3]
    for row in figures["compared"]:
        assert set(row["s"]) == {"jinfer", "generate", "continuous batching"}
        assert all(elapsed_s > 0 for elapsed_s in row["s"].values())
    assert "prompts  jinfer  generate  ratio  continuous batching  ratio" in out
    words = ["--repeats", "1", "--num-prompts", "2", "--compare", "generate"]
    _, figures = bench("throughput", "--input-tokens", "8", "--output-tokens", "4", *words, *SMALL)
    assert set(figures["compared"][0]["s"]) == {"jinfer", "generate"}
