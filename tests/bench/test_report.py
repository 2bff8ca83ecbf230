"""From what was recorded to what is told."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinfer.bench.ceilings import Ceilings
from jinfer.bench.compare import Compared, compare, compared_text
from jinfer.bench.device_log import DeviceTimes, device_times
from jinfer.bench.goals import Goals
from jinfer.bench.plot import token_rates
from jinfer.bench.report import Spread, make_report, most_at_once, report_text
from jinfer.bench.roofline import Costs, StepWork
from jinfer.bench.runner import Recording, Served
from jinfer.bench.startup import program_said, startup_text
from jinfer.bench.table import WIDTH
from jinfer.bench.workload import Job
from jinfer.compile import names
from jinfer.config import ModelConfig
from jinfer.schedule.plan import Chunk
from jinfer.schedule.sequence import TokenSequence

CEILINGS = Ceilings(copy_bytes_per_s=1e9, read_bytes_per_s=5e8, flops_per_s=1e10, dtype="float32")
MODEL = ModelConfig(
    family="llama",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=16,
    num_layers=3,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


def test_spreads() -> None:
    assert Spread.of([]) is None
    assert Spread.of([2.0]) == Spread(mean=2.0, median=2.0, p90=2.0, p99=2.0)
    spread = Spread.of([float(i) for i in range(101)])
    assert spread == Spread(mean=50.0, median=50.0, p90=90.0, p99=99.0)


def chunk(start: int, num_tokens: int, num_logits_rows: int) -> Chunk:
    sequence = TokenSequence(request_id="a", index=0, prompt_ids=(), max_length=64)
    return Chunk(sequence, 0, start, num_tokens, True, num_logits_rows)  # pyright: ignore


def test_costs_are_those_of_the_model() -> None:
    costs = Costs.of(MODEL, itemsize=2, kv_bytes=96)
    block = 8 * 2 * (4 + 2 + 2 + 4) + 3 * 8 * 16  # q, k, v, o and the three of the MLP
    norms = 2 * 8
    assert costs.weight_bytes == 2 * (3 * (block + norms) + 8 + 800)  # the unembedding, not both
    assert costs.flops_per_token == 2 * 3 * block
    assert costs.flops_per_logits_row == 2 * 800


def test_a_step_counts_what_is_seen() -> None:
    costs = Costs.of(MODEL, itemsize=2, kv_bytes=96)
    work = costs.step([chunk(5, 1, 1), chunk(2, 3, 1)])
    pairs = 6 + (3 + 4 + 5)
    assert work.num_bytes == costs.weight_bytes + (6 + 5) * 96
    assert work.num_flops == (
        4 * costs.flops_per_token + pairs * costs.flops_per_pair + 2 * costs.flops_per_logits_row
    )
    assert costs.flops_per_pair == 2 * 2 * 3 * 4 * 2  # two products, each multiply and add


def test_a_step_begins_when_it_was_sent_or_the_one_before_was_done() -> None:
    dispatches = [(1.0, 3.0), (2.0, 5.0), (6.0, 7.0)]
    times = device_times(dispatches, start_s=0.0, without_work=[])
    assert times == DeviceTimes(busy_s=5.0, waited_s=2.0)
    idle = device_times(dispatches, start_s=0.0, without_work=[(5.5, 5.75), (8.0, 9.0)])
    assert idle == DeviceTimes(busy_s=5.0, waited_s=1.75)
    assert device_times([], start_s=0.0, without_work=[]) == DeviceTimes(busy_s=0, waited_s=0)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), max_size=8))
def test_busy_and_waiting_fill_the_time(gaps: list[tuple[float, float]]) -> None:
    dispatches, sent_s, done_s = [], 0.0, 0.0
    for gap_s, run_s in gaps:
        sent_s += gap_s
        done_s = max(sent_s, done_s) + run_s
        dispatches.append((sent_s, done_s))
    times = device_times(dispatches, start_s=0.0, without_work=[])
    assert times.busy_s + times.waited_s == pytest.approx(done_s)
    assert times.busy_s == pytest.approx(sum(run_s for _, run_s in gaps))


def recording() -> Recording:
    return Recording(
        served=[
            Served(10, 0.0, queue_s=0.25, token_s=[1.0, 1.5, 2.5]),
            Served(20, 0.0, queue_s=0.5, token_s=[2.0]),
        ],
        elapsed_s=4.0,
        idle_s=1.0,
        device=DeviceTimes(busy_s=2.0, waited_s=0.75),
        steps=[
            StepWork(num_bytes=10**9, num_flops=10**9),  # bound by bandwidth: 1 s
            StepWork(num_bytes=10**8, num_flops=5 * 10**9),  # by arithmetic: 0.5 s
        ],
        num_places=16,
        num_tokens=12,
        kv_waste=0.125,
        num_late_compiles=0,
        num_preemptions=1,
        num_cached_tokens=1234,
    )


def test_report() -> None:
    report = make_report([(recording(), CEILINGS)])
    assert report.num_output_tokens == 4 and report.num_input_tokens == 30
    assert report.rates()["total_tokens_per_s"] == 34 / 4
    assert report.spreads["TTFT"] == Spread(
        mean=1.5, median=1.5, p90=pytest.approx(1.9), p99=pytest.approx(1.99)
    )
    assert report.spreads["TPOT"] == Spread(mean=0.75, median=0.75, p90=0.75, p99=0.75)
    assert report.max_concurrency == 2
    itl = report.spreads["ITL"]
    assert itl is not None and itl.mean == 0.75
    assert report.device_busy == 0.5 and report.device_waited == 0.25
    assert report.padding_waste == 0.25 and report.kv_waste == 0.125
    assert report.roofline.bound_s == 1.5 and report.roofline.share == 0.5
    assert report.as_json()["roofline_share"] == 0.5
    # Reading alone is half as fast; the second step is bound by arithmetic all the same.
    assert report.roofline.read_bound_s == 2.5
    assert report.as_json()["read_share"] == 2.5 / 3.0


def test_goodput_counts_who_met_every_goal() -> None:
    for words, num_good in (
        ([], 2),
        (["ttft:1000"], 1),
        (["ttft:2000", "tpot:750"], 2),
        (["ttft:2000", "tpot:749.9"], 1),  # a single token has no TPOT
        (["e2el:2100"], 1),
        (["ttft:900"], 0),
    ):
        report = make_report([(recording(), CEILINGS)], Goals.parse(words))
        assert report.num_good == num_good, words
        assert report.rates()["good_requests_per_s"] == num_good / 4
        assert ("goodput" in report_text(report)) == bool(words)
    report = make_report([(recording(), CEILINGS)], Goals.parse(["ttft:1000", "tpot:800"]))
    said = "of requests within TTFT 1,000, TPOT 800 ms\n                    0.250  a second"
    assert f"goodput            50.0 %  {said}" in report_text(report)
    assert report.as_json()["goals_ms"] == {"TTFT": 1000, "TPOT": 800}


@pytest.mark.parametrize("words", [["ttft"], ["itl:5"], ["ttft:x"], ["tpot:0"], ["ttft:1"] * 2])
def test_goals_that_are_none(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--goodput takes ttft, tpot and e2el.*; got '.*Write"):
        Goals.parse(words)


def test_report_reads_well() -> None:
    text = report_text(make_report([(recording(), CEILINGS)]))
    assert "2 steps had to move 1.10 GB and to compute 6.00 GFLOP," in text
    assert "ITL 0" not in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "at least 1.50 s at the rates measured beside them; took 3.00 s: 50.0 % reached" in text
    assert "at the rate of reading alone at least 2.50 s: 83.3 % reached" in text
    assert "waited for host    25.0 %  of the time with requests" in text
    assert "from prefix cache   1,234  prompt tokens" in text
    goals = Goals.parse(["ttft:60000", "tpot:60000", "e2el:60000"])
    text = report_text(make_report([(recording(), CEILINGS)], goals))
    assert max(map(len, text.splitlines())) <= WIDTH


def test_tokens_that_come_together_are_told() -> None:
    burst = recording()
    for one in burst.served:
        one.token_s = [1.0] * 4
    assert "tokens of one dispatch come together: ITL 0" in report_text(
        make_report([(burst, CEILINGS)])
    )


def test_two_recordings_add_up() -> None:
    half = replace(CEILINGS, copy_bytes_per_s=5e8, read_bytes_per_s=5e8, flops_per_s=5e9)
    report = make_report([(recording(), CEILINGS), (recording(), half)])
    assert report.elapsed_s == 8.0 and report.num_requests == 4 and report.device_busy == 0.5
    # Each is held against what the device could do beside it: half of that, and all of half that.
    assert report.roofline.share == 0.75 and report.roofline.ceilings == CEILINGS


def test_comparison_takes_turns_and_drops_the_first() -> None:
    turns = []
    runs = {name: lambda jobs, name=name: turns.append(name) for name in ("jinfer", "other")}
    row = compare(runs, [Job(prompt_ids=(3, 4), num_output_tokens=7)] * 2, repeats=2)
    assert turns == ["jinfer", "other"] * 3
    assert row.num_jobs == 2 and row.num_input_tokens == 4 and row.num_output_tokens == 14
    assert [len(times) for times in row.turns_s.values()] == [2, 2]
    turns_s = {"jinfer": [0.5, 9.0, 0.4], "other": [2.0, 1.0, 2.5]}
    told = Compared(num_jobs=8, num_input_tokens=64, num_output_tokens=100, turns_s=turns_s)
    assert told.as_json()["s"] == {"jinfer": 0.5, "other": 2.0}
    assert compared_text([told]).splitlines()[:2] == [
        "prompts  jinfer  other  ratio",
        "8           200   50.0   4.00",
    ]


def test_startup_table() -> None:
    cold = {
        "import_s": 1.0,
        "engine_s": 20.5,
        "weights_s": 4.0,
        "weights_bytes": 2_000_000_000,
        "programs_s": 20.0,
        "program_s": {"step of 512 tokens": 15.25, "decode of 8 rows": 5.5},
        "first_token_s": 0.1,
        "total_s": 22.0,
        "num_compiled": 2,
        "num_read": 0,
    }
    text = startup_text({"cold": cold, "random": {**cold, "engine_s": 2.0, "weights_bytes": 0}})
    assert text.splitlines() == [
        "seconds                                 cold  random",
        "import jinfer and JAX                   1.00    1.00",
        "LLM(...), all in all                   20.50    2.00",
        "  loading the weights                   4.00    4.00",
        "  beside that, getting programs        20.00   20.00",
        "    prompts, up to 512 tokens at once  15.25   15.25",
        "    output, up to 8 at once             5.50    5.50",
        "first token                             0.10    0.10",
        "process, from start to end             22.00   22.00",
        "weights, GB/s                          0.500       -",
        "programs compiled                          2       2",
        "programs read from disk                    0       0",
    ]


def test_every_program_has_a_name_for_newcomers() -> None:
    internal = [value for name, value in vars(names).items() if name.isupper()]
    said = [program_said(name) for name in internal]
    assert len(set(said)) == len(said) >= 5 and not any("_" in each for each in said)
    assert program_said(names.step_name(8)) == "prompts, up to 8 tokens at once"
    assert program_said(names.decode_name(1)) == "output, one at once"


def test_bars_of_the_plot_add_up_to_the_tokens() -> None:
    # Bursts of 8 tokens every 0.1 s from 2.1 s on, then an idle second, then one more burst.
    first = Served(10, 2.0, token_s=[0.1 * (1 + i // 8) for i in range(80)])
    second = Served(10, 4.0, token_s=[0.5] * 10)
    one = replace(recording(), served=[first, second])
    for num_bins in (7, 50, 1000):
        edges_s, rates = token_rates([one], num_bins)
        assert (edges_s[0], edges_s[-1]) == pytest.approx((0.0, 2.5))
        assert np.sum(rates * np.diff(edges_s)) == pytest.approx(90)
        assert rates.max() == pytest.approx(80)
    middles_s = (edges_s[1:] + edges_s[:-1]) / 2
    assert rates[middles_s < 0.99] == pytest.approx(80)
    assert rates[(middles_s > 1.01) & (middles_s < 1.99)] == pytest.approx(0)
    assert rates[middles_s > 2.01] == pytest.approx(20)


def test_the_most_at_once() -> None:
    served = [Served(1, s, token_s=[1.0]) for s in (0.0, 0.5, 1.0, 1.25, 9.0)]
    assert most_at_once(served) == 3 and most_at_once(served[:1]) == 1
    assert most_at_once([served[0], served[2]]) == 1  # one comes when the other is answered
