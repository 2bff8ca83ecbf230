"""`--compare`: jinfer and transformers take turns; jinfer's runs are recorded."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinfer.bench.ceilings import Ceilings
from jinfer.bench.compare import Compared, Run, compare, require_transformers, transformers_runs
from jinfer.bench.models import SHAPES
from jinfer.bench.report import Recorded
from jinfer.bench.runner import Recording, run_jobs
from jinfer.bench.workload import Job
from jinfer.cli.bench_arguments import COMPARED_WAYS
from jinfer.llm import LLM
from jinfer.shipped import find_shipped
from jinfer.weights.hub import resolve_model

COMPARED_TURNS = 3


def is_compared(args: Namespace) -> bool:
    """Whether `--compare` is given; not every benchmark has the flag."""
    return getattr(args, "compare", None) is not None


def check_compare(args: Namespace) -> None:
    """Refuses flags that the run would not use, and a comparison without transformers.

    Sets the defaults of `--compare` and its `--repeats`.
    """
    flag, which = ("profile", "with") if is_compared(args) else ("repeats", "without")
    value = getattr(args, flag)
    if value is not None:
        raise ValueError(f"--{flag} does nothing {which} --compare; got --{flag} {value}. Drop it.")
    if is_compared(args):
        require_transformers()
        args.compare = args.compare or list(COMPARED_WAYS)
        args.repeats = args.repeats or COMPARED_TURNS


@contextmanager
def other_ways(args: Namespace, asked: dict[str, Any], llm: LLM) -> Iterator[dict[str, Run]]:
    """Yields the ways of transformers by name; none without `--compare`."""
    if not is_compared(args):
        yield {}
        return
    folder = Path(asked["model"]) if args.model in SHAPES else None
    folder = folder or find_shipped(args.model) or resolve_model(args.model)
    ways = [way.replace("-", " ") for way in args.compare]
    is_dummy, dtype = asked.get("load_format") == "dummy", llm.engine.plan.dtype
    with transformers_runs(folder, ways, dummy=is_dummy, dtype=dtype) as runs:
        yield runs


def record_beside(
    llm: LLM,
    others: Mapping[str, Run],
    jobs: Sequence[Job],
    *,
    repeats: int,
    measure: Callable[[], Ceilings],
) -> tuple[Recorded, Compared]:
    """Takes turns with the others; records jinfer's runs except the warm-up.

    A run is recorded with the faster of the ceilings measured right before and right after it.
    """
    recordings: list[Recording] = []
    measured: list[Ceilings] = []

    def answer(jobs: Sequence[Job]) -> None:
        # The others compute the prompts again in every turn; jinfer must too.
        llm.reset_prefix_cache()
        recordings.append(run_jobs(llm, jobs, streams=False))

    compared = compare(
        {"jinfer": answer, **others},
        jobs,
        repeats,
        around_first=lambda: measured.append(measure()),
    )
    ceilings = [a.faster(b) for a, b in zip(measured[::2], measured[1::2], strict=True)]
    every = list(zip(recordings, ceilings, strict=True))
    return every[1:], compared  # the first turn is the warm-up, as in `compare`
