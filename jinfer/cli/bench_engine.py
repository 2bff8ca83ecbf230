"""`jinfer bench latency`, `throughput` and `serve`."""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from jinfer.bench.ceilings import Ceilings, measure_ceilings
from jinfer.bench.compare import Compared, Run, compared_text
from jinfer.bench.goals import Goals
from jinfer.bench.machine import devices, machine_line, versions
from jinfer.bench.models import model_arguments
from jinfer.bench.plot import plot, require_matplotlib
from jinfer.bench.report import Recorded, make_report, report_text
from jinfer.bench.runner import require_one_replica, run_jobs
from jinfer.bench.workload import (
    Job,
    fitted,
    make_jobs,
    poisson_arrivals,
    read_trace,
    sharegpt_lengths,
)
from jinfer.cli.arguments import engine_args
from jinfer.cli.bench_arguments import LENGTH_DEFAULTS, LENGTHS_OF
from jinfer.cli.bench_compare import check_compare, other_ways, record_beside
from jinfer.cli.profile import profiled, require_profile_folder
from jinfer.cli.screen import counted, note, show
from jinfer.config import EngineConfig
from jinfer.llm import LLM
from jinfer.startup.defaults import platform_of, resolve_dtype

Plans = list[tuple[str, list[list[Job]]]]  # for each run: its description, and its batches in order


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """The measurements of one run."""

    said: str
    recorded: Recorded
    compared: Compared | None  # None without --compare


def run(args: Namespace) -> dict[str, Any]:
    """Measures, prints the tables, and returns every figure for the JSON file."""
    _check(args)
    platform = platform_of(jax.devices()[0])
    with model_arguments(args.model) as keywords:
        asked = {"late_compile": "error", **keywords, **_sizes(args), **engine_args(args)}
        measure = partial(measure_ceilings, platform, _product_dtype(args, platform))
        # Other work changes a CPU's speed, so its ceilings are measured around every run. On an
        # accelerator the engine takes the memory: measure before it starts and after it ends.
        is_steady = platform != "cpu"
        beside = cache(measure) if is_steady else measure
        if is_steady:
            beside()
        with LLM(**asked) as llm, other_ways(args, asked, llm) as others:
            model_line = _model_line(args, llm)
            runs = [
                _run_plan(args, llm, others, said, batches, beside)
                for said, batches in _plans(args, llm)
            ]
            told = _told(args, llm)
        if is_steady:
            last = measure()
            runs = [
                replace(one, recorded=[(r, ceilings.faster(last)) for r, ceilings in one.recorded])
                for one in runs
            ]
    show(f"{machine_line()}\n{model_line}\n")
    goals = Goals.parse(args.goodput) if _asks_goals(args) else Goals.of_engine(llm.engine.config)
    told["runs"] = [_report(one, goals) for one in runs]
    if compared := [one.compared for one in runs if one.compared]:
        show(f"\n{compared_text(compared)}")
        told["compared"] = [row.as_json() for row in compared]
    if args.plot is not None:
        _plot(args, runs[-1])
    return told


def _plot(args: Namespace, run: _Measured) -> None:
    recordings, said = [recording for recording, _ in run.recorded], run.said
    if run.compared:  # the others ran between jinfer's turns
        recordings, said = recordings[-1:], f"{said}; jinfer's last turn"
    plot(recordings, args.plot, title=f"{args.benchmark}: {said}")


def _say(args: Namespace) -> Callable[[str], object]:
    """Returns the function that prints progress; with --quiet it prints nothing."""
    return (lambda text: None) if args.quiet else note


def _report(run: _Measured, goals: Goals) -> dict[str, Any]:
    report = make_report(run.recorded, goals)
    said = run.said
    if run.compared:
        said += f"; jinfer, {counted(len(run.recorded), 'turn')}"
    show(f"\n{said}\n{report_text(report)}")
    return {"workload": run.said, **report.as_json()}


def _asks_goals(args: Namespace) -> bool:
    return bool(getattr(args, "goodput", None))


def _check(args: Namespace) -> None:
    if args.plot is not None:
        require_matplotlib(args.plot)
    if _asks_goals(args):
        Goals.parse(args.goodput)  # raises now, not after the run
    if args.benchmark != "latency":
        _check_workload(args)
    replicas = getattr(args, "data_parallel_size", 1)
    if isinstance(replicas, int):  # the engine rejects other types
        require_one_replica(replicas)
    require_profile_folder(args.profile)  # creates it


def _check_workload(args: Namespace) -> None:
    if (args.workload == "trace") != (args.trace is not None):
        raise ValueError(
            "--workload trace and --trace FILE go together; "
            f"got --workload {args.workload}, --trace {args.trace}. Give both or neither."
        )
    _settle_lengths(args)
    if args.workload == "trace" and not 0 < args.scale < math.inf:
        raise ValueError(
            f"--scale must be above 0 and finite; got {args.scale}. Choose another factor."
        )
    if args.benchmark == "throughput":
        check_compare(args)
    if args.benchmark == "serve" and args.rate is not None and not args.rate > 0:
        raise ValueError(f"--rate must be above 0; got {args.rate}. Pass another.")
    if args.plot is not None and len(args.num_prompts) > 1:
        raise ValueError(
            f"--plot draws one run; got --num-prompts {' '.join(map(str, args.num_prompts))}. "
            "Give one number."
        )
    if args.workload == "trace":  # raises now, not after the engine has started
        read_trace(args.trace, max(args.num_prompts), args.scale)


def _settle_lengths(args: Namespace) -> None:
    """Sets the workload's default lengths; refuses flags that it does not use."""
    used = LENGTHS_OF[args.workload]
    for name, default in LENGTH_DEFAULTS.items():
        value = getattr(args, name)
        if value is None and name in used:
            setattr(args, name, default)
        elif value is not None and name not in used:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} does nothing with --workload {args.workload}; got {flag} {value}. Drop it."
            )
    if args.workload == "shared-prefix" and args.shared_tokens >= args.input_tokens:
        raise ValueError(
            "--shared-tokens must be below --input-tokens, or all prompts are equal; got "
            f"--shared-tokens {args.shared_tokens}, --input-tokens {args.input_tokens}. "
            "Choose fewer."
        )


def _sizes(args: Namespace) -> dict[str, int]:
    """Engine sizes that fit the batch, unless the user chose sizes."""
    if args.benchmark != "latency" or "max_num_seqs" in args or "max_num_batched_tokens" in args:
        return {}
    step_tokens = min(512, 1 << (args.batch_size * args.input_tokens).bit_length())
    return {
        "max_num_seqs": args.batch_size,
        "max_num_batched_tokens": max(8, args.batch_size, step_tokens),
    }


def _product_dtype(args: Namespace, platform: str) -> str:
    """The dtype of the measured matrix product: the engine's dtype."""
    asked = getattr(args, "dtype", "auto")
    if asked not in ("auto", "float32", "bfloat16", "float16", "float", "half"):
        return "float32"  # the engine raises the error
    return resolve_dtype(EngineConfig(model=args.model, dtype=asked), platform)


def _plans(args: Namespace, llm: LLM) -> Plans:
    engine = llm.engine
    rng = np.random.default_rng(args.seed)
    vocab_size, max_len = engine.model.vocab_size, engine.plan.max_model_len
    if args.benchmark == "latency":
        lengths, num_cut = fitted([(args.input_tokens, args.output_tokens)], max_len)
        batches = [
            make_jobs(lengths * args.batch_size, vocab_size=vocab_size, rng=rng)
            for _ in range(args.repeats + 1)
        ]
        said = f"batch of {args.batch_size}, {args.repeats} times" + _said_lengths(
            lengths * args.batch_size, num_cut
        )
        return [(said, batches)]
    return [_workload(args, num_jobs, vocab_size, max_len, rng) for num_jobs in args.num_prompts]


def _workload(
    args: Namespace, num_jobs: int, vocab_size: int, max_len: int, rng: np.random.Generator
) -> tuple[str, list[list[Job]]]:
    arrivals: list[float] | None = None
    lengths = [(args.input_tokens, args.output_tokens)] * num_jobs
    if args.workload == "sharegpt":
        lengths = sharegpt_lengths(num_jobs, rng)
    elif args.workload == "trace":
        lengths, arrivals = read_trace(args.trace, num_jobs, args.scale)
    when = "all at the start"
    if args.benchmark == "throughput":
        arrivals = None
    elif arrivals is None or args.rate is not None:
        rate = args.rate or (math.inf if args.max_concurrency else 1.0)
        arrivals = poisson_arrivals(len(lengths), rate, rng)
        when = "all at the start" if math.isinf(rate) else f"{rate:g} a second"
    else:
        when = "as in the trace"
    if limit := getattr(args, "max_concurrency", None):
        when += f", {limit:,} at most at once"
    lengths, num_cut = fitted(lengths, max_len)
    jobs = make_jobs(
        lengths,
        vocab_size=vocab_size,
        rng=rng,
        arrivals=arrivals,
        num_shared=args.shared_tokens if args.workload == "shared-prefix" else 0,
    )
    said = f"{args.workload}, {counted(len(jobs), 'request')}, {when}" + _said_lengths(
        lengths, num_cut
    )
    return said, [jobs]


def _said_lengths(lengths: Sequence[tuple[int, int]], num_cut: int) -> str:
    num_input, num_output = (sum(column) for column in zip(*lengths, strict=True))
    cut = f"; {num_cut:,} cut to fit the context" if num_cut else ""
    return f"; {num_input:,} tokens in, {num_output:,} out{cut}"


def _run_plan(
    args: Namespace,
    llm: LLM,
    others: Mapping[str, Run],
    said: str,
    batches: list[list[Job]],
    measure: Callable[[], Ceilings],
) -> _Measured:
    if not others:
        recorded = _record(args, llm, batches, measure)
        return _Measured(said=said, recorded=recorded, compared=None)
    [jobs] = batches
    turns, ways = counted(args.repeats + 1, "turn"), counted(1 + len(others), "way")
    _say(args)(f"comparing on {counted(len(jobs), 'request')}: {turns} of {ways}")
    recorded, compared = record_beside(llm, others, jobs, repeats=args.repeats, measure=measure)
    return _Measured(said=said, recorded=recorded, compared=compared)


def _record(
    args: Namespace, llm: LLM, batches: list[list[Job]], measure: Callable[[], Ceilings]
) -> Recorded:
    """Runs the batches one after the other; returns each with the ceilings of its time.

    The first of several batches is the warm-up; a single batch warms up with its first job. A run
    is recorded with the faster of the ceilings measured before and after it.
    """
    streams = args.benchmark == "serve" or getattr(args, "stream", False)
    most = getattr(args, "max_concurrency", None)
    first, *others = batches
    run_jobs(llm, first if others else [replace(first[0], arrival_s=0.0)], streams=streams)
    llm.reset_prefix_cache()
    batches = others or batches
    _say(args)(f"running {sum(map(len, batches))} requests")
    # Ceilings measured between runs would fill the profile.
    between = cache(measure) if args.profile else measure
    recordings, measured = [], [between()]
    with profiled(args.profile):
        for batch in batches:
            recordings.append(run_jobs(llm, batch, streams=streams, max_concurrency=most))
            measured.append(between())
    if args.profile:
        measured[-1] = measure()
    ceilings = [before.faster(after) for before, after in pairwise(measured)]
    return list(zip(recordings, ceilings, strict=True))


def _model_line(args: Namespace, llm: LLM) -> str:
    plan, model = llm.engine.plan, llm.engine.model
    return (
        f"{args.model}, {model.num_parameters / 1e6:,.1f} million parameters, {plan.dtype}, "
        f"{plan.attention} attention, {counted(plan.max_slots, 'sequence')} at once, "
        f"steps of up to {counted(plan.max_step_tokens, 'token')}"
    )


def _told(args: Namespace, llm: LLM) -> dict[str, Any]:
    """The head of the JSON file: benchmark, model, versions, devices, arguments and plan."""
    return {
        "benchmark": args.benchmark,
        "model": args.model,
        **versions(),
        **devices(),
        "arguments": {**vars(args), **_hidden(args)},
        "plan": asdict(llm.engine.plan),
    }


def _hidden(args: Namespace) -> dict[str, str]:
    """What a report must not hold, in place of the access token of the hub."""
    return {"hf_token": "given"} if getattr(args, "hf_token", None) else {}
