"""Turns recordings into figures and their table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import numpy as np

from jinfer.bench.ceilings import Ceilings
from jinfer.bench.goals import Goals
from jinfer.bench.runner import Recording, Served
from jinfer.bench.table import amount, figure, percent, table

Recorded = list[tuple[Recording, Ceilings]]  # each run, and the ceilings measured beside it


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """One quantity over many requests or tokens, in seconds."""

    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None without values; percentiles are interpolated between two values."""
        if not values:
            return None
        median, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(mean=float(np.mean(values)), median=median, p90=p90, p99=p99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """The necessary traffic and arithmetic, and the least time for it at each run's ceilings."""

    num_bytes: int
    num_flops: int
    bound_s: float  # sum over steps, each bound by bandwidth or by arithmetic
    read_bound_s: float  # the same at the read rate
    took_s: float  # time with requests
    ceilings: Ceilings  # the best of all runs

    @property
    def share(self) -> float:
        """Fraction of the bound reached; 1 is the limit."""
        return self.bound_s / self.took_s

    @property
    def read_share(self) -> float:
        """The same at the read rate."""
        return self.read_bound_s / self.took_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The figures of one benchmark of an engine."""

    num_requests: int
    num_input_tokens: int
    num_output_tokens: int
    elapsed_s: float
    spreads: dict[str, Spread | None]
    device_busy: float  # fraction of the elapsed time
    device_waited: float  # fraction of the time with requests
    padding_waste: float  # fraction of computed token places that were padding
    kv_waste: float  # fraction of allocated cells that were empty
    num_late_compiles: int
    num_preemptions: int
    num_cached_tokens: int
    num_steps: int
    num_good: int  # requests that met all goals
    max_concurrency: int  # most requests at the same time, waiting ones included
    goals: Goals
    roofline: Roofline

    def as_json(self) -> dict[str, Any]:
        """Every figure, including rates and fractions."""
        derived = {**self.rates(), "goals_ms": self.goals.limits_ms}
        told = {name: value for name, value in asdict(self).items() if name != "goals"}
        shares = {"roofline_share": self.roofline.share, "read_share": self.roofline.read_share}
        return {**told, **derived, **shares}

    def rates(self) -> dict[str, float]:
        """Per second of the elapsed time."""
        return {
            "requests_per_s": self.num_requests / self.elapsed_s,
            "good_requests_per_s": self.num_good / self.elapsed_s,
            "input_tokens_per_s": self.num_input_tokens / self.elapsed_s,
            "output_tokens_per_s": self.num_output_tokens / self.elapsed_s,
            "total_tokens_per_s": (self.num_input_tokens + self.num_output_tokens) / self.elapsed_s,
        }


def make_report(
    recorded: Sequence[tuple[Recording, Ceilings]], goals: Goals | None = None
) -> Report:
    """Sums up consecutive runs, and counts the requests that met the goals, if any.

    Args:
      recorded: each run, and the ceilings measured beside it.
      goals: limits for each request.
    """
    goals = goals or Goals()
    recordings = [recording for recording, _ in recorded]
    served = [one for recording in recordings for one in recording.served]
    elapsed_s = sum(r.elapsed_s for r in recordings)
    with_work_s = elapsed_s - sum(r.idle_s for r in recordings)
    steps = [step for r in recordings for step in r.steps]
    num_places = sum(r.num_places for r in recordings)
    roofline = Roofline(
        num_bytes=sum(step.num_bytes for step in steps),
        num_flops=sum(step.num_flops for step in steps),
        bound_s=sum(
            ceilings.bound_s(step.num_bytes, step.num_flops)
            for recording, ceilings in recorded
            for step in recording.steps
        ),
        read_bound_s=sum(
            ceilings.read_bound_s(step.num_bytes, step.num_flops)
            for recording, ceilings in recorded
            for step in recording.steps
        ),
        took_s=with_work_s,
        ceilings=reduce(Ceilings.faster, (ceilings for _, ceilings in recorded)),
    )
    return Report(
        num_requests=len(served),
        num_input_tokens=sum(one.num_input_tokens for one in served),
        num_output_tokens=sum(len(one.token_s) for one in served),
        elapsed_s=elapsed_s,
        spreads={
            "queue": Spread.of([one.queue_s for one in served]),
            "TTFT": Spread.of([one.ttft_s for one in served]),
            "TPOT": Spread.of([one.tpot_s for one in served if one.tpot_s is not None]),
            "ITL": Spread.of([gap for one in served for gap in one.itl_s]),
            "end to end": Spread.of([one.e2e_s for one in served]),
        },
        device_busy=sum(r.device.busy_s for r in recordings) / elapsed_s,
        device_waited=sum(r.device.waited_s for r in recordings) / with_work_s,
        padding_waste=1 - sum(r.num_tokens for r in recordings) / max(1, num_places),
        kv_waste=float(np.mean([r.kv_waste for r in recordings])),
        num_late_compiles=sum(r.num_late_compiles for r in recordings),
        num_preemptions=sum(r.num_preemptions for r in recordings),
        num_cached_tokens=sum(r.num_cached_tokens for r in recordings),
        num_steps=len(steps),
        num_good=sum(map(goals.met_by, served)),
        max_concurrency=max(most_at_once(r.served) for r in recordings),
        goals=goals,
        roofline=roofline,
    )


def most_at_once(served: Sequence[Served]) -> int:
    """The most requests that were sent and not yet answered, at any time."""
    changes = [(one.arrived_s, 1) for one in served]
    changes += [(one.arrived_s + one.e2e_s, -1) for one in served]
    # At the same moment, an answer comes before the request that takes its place.
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def report_text(report: Report) -> str:
    """The tables, for 100 columns."""
    rates, r = report.rates(), report.roofline
    times = [
        (name, *(figure(value * 1e3) for value in asdict(spread).values()))
        for name, spread in report.spreads.items()
        if spread is not None
    ]
    speed = (
        f"{figure(rates['requests_per_s'])} requests/s; tokens/s: "
        f"{figure(rates['input_tokens_per_s'])} in, {figure(rates['output_tokens_per_s'])} out, "
        f"{figure(rates['total_tokens_per_s'])} in all; {report.elapsed_s:,.2f} s"
    )
    lines = [
        ("device busy", percent(report.device_busy), "of the elapsed time"),
        ("waited for host", percent(report.device_waited), "of the time with requests"),
        ("padding waste", percent(report.padding_waste), "of the token places computed"),
        ("KV waste", percent(report.kv_waste), "of the KV cache allocated, but not filled"),
        ("late compiles", str(report.num_late_compiles), "after warm-up; must be 0"),
        ("concurrency", f"{report.max_concurrency:,}", "requests at most, waiting ones included"),
        ("preemptions", str(report.num_preemptions), ""),
        ("from prefix cache", f"{report.num_cached_tokens:,}", "prompt tokens"),
    ]
    if limits_ms := report.goals.limits_ms:
        said = ", ".join(f"{name} {figure(ms)}" for name, ms in limits_ms.items())
        rate = figure(rates["good_requests_per_s"])
        share = percent(report.num_good / max(1, report.num_requests))
        lines += [("goodput", share, f"of requests within {said} ms"), ("", rate, "a second")]
    name_width = max(len(name) for name, _, _ in lines)
    value_width = max(len(value) for _, value, _ in lines)
    shares = "\n".join(
        f"{name:<{name_width}}  {value:>{value_width}}  {said}".rstrip()
        for name, value, said in lines
    )
    roofline = (
        f"roofline: {report.num_steps:,} steps had to move {amount(r.num_bytes, 'B')} and to "
        f"compute {amount(r.num_flops, 'FLOP')},\nat least {figure(r.bound_s)} s at the "
        f"rates measured beside them; took {figure(r.took_s)} s: {percent(r.share)} reached\n"
        f"at the rate of reading alone at least {figure(r.read_bound_s)} s: "
        f"{percent(r.read_share)} reached\n"
        f"at best: {r.ceilings}"
    )
    header = ("ms", "mean", "median", "p90", "p99")
    gaps = report.spreads["ITL"]
    bursts = "" if gaps is None or gaps.median else "tokens of one dispatch come together: ITL 0\n"
    return f"{speed}\n\n{table(header, times)}\n{bursts}\n{shares}\n\n{roofline}\n"
