"""What an engine counts, and the text that Prometheus reads."""

import asyncio
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinfer import LLM, AsyncLLM, SamplingParams
from jinfer.engine.metrics import EngineMetrics, Histogram, Load, MetricsSnapshot

# The sizes of tests/test_llm.py, so the programs are the same.
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 8, "max_model_len": 128, "progress": False}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(late_compile="error", **SMALL) as llm:
        yield llm


@given(st.lists(st.floats(0, 10)))
def test_histogram_puts_each_value_in_its_bucket(values: list[float]) -> None:
    histogram = Histogram((1.0, 2.5, 5.0))
    for value in values:
        histogram.observe(value)
    snapshot = histogram.snapshot()
    bounds = (0.0, 1.0, 2.5, 5.0, float("inf"))
    want = [
        sum(low < v <= high or (v == low == 0) for v in values)
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    assert list(snapshot.counts) == want and snapshot.count == len(values)
    assert snapshot.total == pytest.approx(sum(values))
    assert snapshot.mean == (pytest.approx(sum(values) / len(values)) if values else None)


def snapshot_of(metrics: EngineMetrics) -> MetricsSnapshot:
    return metrics.snapshot(Load(num_running=2, num_waiting=1, num_pages_used=3, num_pages=12))


def test_a_snapshot_stays_as_it_was() -> None:
    metrics = EngineMetrics()
    metrics.finished("stop", e2e_s=1.0, tpot_s=None)
    before = snapshot_of(metrics)
    metrics.finished("stop", e2e_s=1.0, tpot_s=0.5)
    assert before.num_finished == {"stop": 1} and before.e2e_s.count == 1
    assert before.tpot_s.count == 0 and before.kv_usage == 0.25


def test_prometheus_text() -> None:
    metrics = EngineMetrics()
    metrics.admitted(queue_s=0.2, num_prompt_tokens=7, num_cached_tokens=4)
    metrics.sampled_token(ttft_s=0.3, gap_s=None)
    metrics.sampled_token(ttft_s=None, gap_s=0.02)
    metrics.finished("length", e2e_s=0.32, tpot_s=0.02)
    text = snapshot_of(metrics).prometheus('a "model"\\')
    lines = text.splitlines()
    label = r'model_name="a \"model\"\\"'
    assert f"jinfer:num_requests_running{{{label}}} 2" in lines
    assert f"jinfer:kv_cache_usage_perc{{{label}}} 0.25" in lines
    assert f"jinfer:prefix_cache_hits_total{{{label}}} 4" in lines
    assert f'jinfer:request_success_total{{{label},finished_reason="length"}} 1' in lines
    assert "# TYPE jinfer:time_to_first_token_seconds histogram" in lines
    buckets = [line for line in lines if line.startswith("jinfer:time_to_first_token_seconds_b")]
    counts = [int(line.rsplit(" ", 1)[1]) for line in buckets]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 1
    assert buckets[-1].startswith(f'jinfer:time_to_first_token_seconds_bucket{{{label},le="+Inf"}}')
    assert f"jinfer:time_to_first_token_seconds_sum{{{label}}} 0.3" in lines
    assert text.endswith("\n") and len(set(lines)) == len(lines)
    sample = re.compile(r"jinfer:[a-z0-9_]+\{.*\} [0-9.e+-]+")
    assert all(line.startswith("# ") or sample.fullmatch(line) for line in lines)


def test_prometheus_own_parser_reads_it() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    metrics = EngineMetrics()
    metrics.finished("stop", e2e_s=3.0, tpot_s=0.1)
    families = parser.text_string_to_metric_families(snapshot_of(metrics).prometheus("m"))
    types = {family.name: family.type for family in families}
    assert types["jinfer:e2e_request_latency_seconds"] == "histogram"
    assert types["jinfer:generation_tokens"] == "counter"
    assert types["jinfer:num_requests_waiting"] == "gauge"


def test_an_engine_counts_what_it_did(llm: LLM) -> None:
    before = llm.metrics()
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    outputs = llm.generate([[3, 4, 5], [6] * 20, [7, 8]], params, use_tqdm=False)
    after = llm.metrics()
    assert after.num_prompt_tokens - before.num_prompt_tokens == 25
    assert after.num_output_tokens - before.num_output_tokens == 15
    assert after.num_finished["length"] - before.num_finished.get("length", 0) == 3
    assert after.queue_s.count - before.queue_s.count == 3
    assert after.ttft_s.count - before.ttft_s.count == 3
    assert after.itl_s.count - before.itl_s.count == 12
    assert after.tpot_s.count - before.tpot_s.count == 3
    ttft_s = sum(output.metrics.ttft_s or 0 for output in outputs)
    assert after.ttft_s.total - before.ttft_s.total == pytest.approx(ttft_s)
    assert (after.num_running, after.num_waiting, after.num_pages_used) == (0, 0, 0)
    assert after.num_pages == llm.engine.plan.num_pages - 1
    assert "jinfer:generation_tokens_total{" in llm.prometheus()


def test_gauges_hits_and_ends_while_it_runs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    prompt = list(range(3, 3 + 40))
    llm.generate([prompt], params, use_tqdm=False)
    before = llm.metrics()
    stream = llm.stream(prompt, params)
    next(stream)
    during = llm.metrics()
    assert during.num_running == 1 and during.num_pages_used > 0 and 0 < during.kv_usage < 1
    assert during.num_cached_tokens - before.num_cached_tokens == 32  # two pages of 16
    stream.close()
    assert llm.metrics().num_finished["abort"] == before.num_finished.get("abort", 0) + 1


def test_preemptions_are_counted() -> None:
    # Two sequences of 48 tokens want 6 pages between them in the end, and there are 4.
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 2, "max_decode_steps": 1}
    with LLM(num_pages=5, max_model_len=64, progress=False, **sizes) as llm:
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        llm.generate([[3] * 8, [4] * 8], params, use_tqdm=False)
        assert llm.metrics().num_preemptions == llm.engine.scheduler.num_preemptions >= 1


def test_the_async_engine_tells_the_same() -> None:
    async def ask() -> MetricsSnapshot:
        async with AsyncLLM(**SMALL) as llm:
            params = SamplingParams(max_tokens=3, ignore_eos=True)
            async for _ in llm.generate([3, 4], params):
                pass
            assert "jinfer:num_requests_running" in llm.prometheus()
            return llm.metrics()

    snapshot = asyncio.run(ask())
    assert snapshot.num_output_tokens == 3 and snapshot.num_finished == {"length": 1}
