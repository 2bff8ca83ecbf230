"""Counts and latencies of an engine since its start, and their Prometheus text."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

# Upper bounds of buckets, in seconds; one more bucket counts the longer times.
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)
_FIRST_TOKEN_S = (*_TOKEN_S, 5, 7.5, 10, 20, 40, 80, 160)
_REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480)


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """Counts of observations; bucket i is those <= bounds[i] and above the bound before."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds: the last is above them all
    total: float  # sum of the observations

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """None where nothing was observed."""
        return self.total / self.count if self.count else None


class Histogram:
    """Counts observations in buckets of fixed bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> HistogramSnapshot:
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._total)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsSnapshot:
    """Metrics of an engine at one moment; counts are since its start.

    Times are the host's: it reads the tokens of one dispatch together. If the dispatch has several
    steps, one gap between tokens is long and the others are short.
    """

    num_running: int  # sequences in a slot
    num_waiting: int
    num_pages_used: int  # of the KV cache; pages kept only for their content count as free
    num_pages: int
    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens found in the prefix cache
    num_output_tokens: int
    num_preemptions: int
    num_finished: Mapping[str, int]  # by finish_reason
    queue_s: HistogramSnapshot
    ttft_s: HistogramSnapshot
    itl_s: HistogramSnapshot
    tpot_s: HistogramSnapshot
    e2e_s: HistogramSnapshot

    @property
    def kv_usage(self) -> float:
        """Fraction of the KV cache's pages that are in use."""
        return self.num_pages_used / self.num_pages

    def prometheus(self, model_name: str) -> str:
        """Returns the text for Prometheus, with vLLM's names after "jinfer:".

        Args:
          model_name: the label of every line.
        """
        return _Exposition(model_name).text(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Sequences and pages of an engine's scheduler at one moment."""

    num_running: int
    num_waiting: int
    num_pages_used: int
    num_pages: int
    num_preemptions: int = 0  # since the start

    def __add__(self, other: "Load") -> "Load":
        return Load(
            num_running=self.num_running + other.num_running,
            num_waiting=self.num_waiting + other.num_waiting,
            num_pages_used=self.num_pages_used + other.num_pages_used,
            num_pages=self.num_pages + other.num_pages,
            num_preemptions=self.num_preemptions + other.num_preemptions,
        )


@dataclass(slots=True)
class EngineMetrics:
    """The counters: only the engine writes them, any thread may take a snapshot."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_finished: Counter[str] = field(default_factory=Counter)
    queue_s: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))
    ttft_s: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN_S))
    itl_s: Histogram = field(default_factory=lambda: Histogram(_TOKEN_S))
    tpot_s: Histogram = field(default_factory=lambda: Histogram(_TOKEN_S))
    e2e_s: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))

    def admitted(self, *, queue_s: float, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A request entered its first step."""
        self.queue_s.observe(queue_s)
        self.num_prompt_tokens += num_prompt_tokens
        self.num_cached_tokens += num_cached_tokens

    def sampled_token(self, *, ttft_s: float | None, gap_s: float | None) -> None:
        """A token was read: a request's first, after `ttft_s`, or one `gap_s` after another."""
        self.num_output_tokens += 1
        if ttft_s is not None:
            self.ttft_s.observe(ttft_s)
        if gap_s is not None:
            self.itl_s.observe(gap_s)

    def finished(self, reason: str, *, e2e_s: float, tpot_s: float | None) -> None:
        """A request ended, for any reason."""
        self.num_finished[reason] += 1
        self.e2e_s.observe(e2e_s)
        if tpot_s is not None:
            self.tpot_s.observe(tpot_s)

    def snapshot(self, load: Load) -> MetricsSnapshot:
        """Returns a frozen copy, together with the engine's load."""
        return MetricsSnapshot(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_pages_used=load.num_pages_used,
            num_pages=load.num_pages,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_preemptions=load.num_preemptions,
            num_finished=dict(self.num_finished),
            queue_s=self.queue_s.snapshot(),
            ttft_s=self.ttft_s.snapshot(),
            itl_s=self.itl_s.snapshot(),
            tpot_s=self.tpot_s.snapshot(),
            e2e_s=self.e2e_s.snapshot(),
        )


# Name after "jinfer:", kind, help; in the order in which they are printed.
_GAUGES = (
    ("num_requests_running", "Running sequences."),
    ("num_requests_waiting", "Sequences that wait for a slot or for pages."),
    ("kv_cache_usage_perc", "Fraction of the KV cache's pages in use; 1 is all of them."),
)
_COUNTERS = (
    ("prompt_tokens_total", "Prompt tokens of requests that began to run."),
    ("generation_tokens_total", "Tokens sampled."),
    ("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
    ("num_preemptions_total", "Sequences that lost their pages and began again."),
)
_HISTOGRAMS = (
    ("request_queue_time_seconds", "From arrival to the first step.", "queue_s"),
    ("time_to_first_token_seconds", "From arrival to the first token.", "ttft_s"),
    ("inter_token_latency_seconds", "Between one token and the next.", "itl_s"),
    ("request_time_per_output_token_seconds", "Mean per request, after the first.", "tpot_s"),
    ("e2e_request_latency_seconds", "From arrival to the last token.", "e2e_s"),
)


class _Exposition:
    """Prometheus's text format, version 0.0.4."""

    def __init__(self, model_name: str) -> None:
        for plain, escaped in (("\\", "\\\\"), ("\n", "\\n"), ('"', '\\"')):
            model_name = model_name.replace(plain, escaped)
        self._label = f'model_name="{model_name}"'
        self._lines: list[str] = []

    def text(self, snapshot: MetricsSnapshot) -> str:
        gauges = (snapshot.num_running, snapshot.num_waiting, snapshot.kv_usage)
        for (name, said), value in zip(_GAUGES, gauges, strict=True):
            self._one(name, "gauge", said, value)
        counters = (
            snapshot.num_prompt_tokens,
            snapshot.num_output_tokens,
            snapshot.num_prompt_tokens,
            snapshot.num_cached_tokens,
            snapshot.num_preemptions,
        )
        for (name, said), value in zip(_COUNTERS, counters, strict=True):
            self._one(name, "counter", said, value)
        self._head("request_success_total", "counter", "Requests that ended, by reason.")
        for reason, count in sorted(snapshot.num_finished.items()):
            self._line("request_success_total", count, f'finished_reason="{reason}"')
        for name, said, attribute in _HISTOGRAMS:
            self._histogram(name, said, getattr(snapshot, attribute))
        return "\n".join(self._lines) + "\n"

    def _one(self, name: str, kind: str, said: str, value: float) -> None:
        self._head(name, kind, said)
        self._line(name, value)

    def _histogram(self, name: str, said: str, histogram: HistogramSnapshot) -> None:
        self._head(name, "histogram", said)
        num_below = 0  # Prometheus counts all observations at or below each bound
        for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
            num_below += count
            self._line(f"{name}_bucket", num_below, f'le="{bound}"')
        self._line(f"{name}_sum", histogram.total)
        self._line(f"{name}_count", histogram.count)

    def _head(self, name: str, kind: str, said: str) -> None:
        self._lines += [f"# HELP jinfer:{name} {said}", f"# TYPE jinfer:{name} {kind}"]

    def _line(self, name: str, value: float, *labels: str) -> None:
        self._lines.append(f"jinfer:{name}{{{','.join((self._label, *labels))}}} {value}")
