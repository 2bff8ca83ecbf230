"""`--compare`: jinfer's turns beside those of transformers, and what is recorded of them."""

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
    """Whether jinfer takes turns with others; not every benchmark has the flag."""
    return getattr(args, "compare", None) is not None


def check_compare(args: Namespace) -> None:
    """Refuses what a comparison, or a run without one, would ignore, and one that cannot be.

    Fills in what a comparison takes and nobody said.
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
    """With whom to take turns, by name; nobody where that was not asked."""
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
    """Takes turns with the others; jinfer's that count are recorded, each held against the better
    of what the device could do right before and right after it.
    """
    recordings: list[Recording] = []
    measured: list[Ceilings] = []

    def answer(jobs: Sequence[Job]) -> None:
        # The others compute every turn's prompts anew, so this does too.
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
    return every[1:], compared  # the first turn warms up, as in `compare`
