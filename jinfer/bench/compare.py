"""Compares jinfer with transformers: same model, same prompts, one process, alternating runs.

Needs the `agreement` extra. Runs alternate, so that a machine whose speed drifts slows all
alike: read the ratios, not the rates.
"""

import copy
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinfer.bench.table import figure, table
from jinfer.bench.workload import Job

Run = Callable[[Sequence[Job]], object]  # answers the jobs, greedily
GENERATE, CONTINUOUS = WAYS = ("generate", "continuous batching")  # of transformers
GENERATE_ROWS = 32  # prompts of one call of `generate`, in the order of the jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Seconds that each way takes to answer the same jobs."""

    num_jobs: int
    num_input_tokens: int
    num_output_tokens: int
    turns_s: dict[str, list[float]]  # for each way, in order

    @property
    def median_s(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.turns_s.items()}

    def as_json(self) -> dict[str, Any]:
        return {
            "num_prompts": self.num_jobs,
            "num_input_tokens": self.num_input_tokens,
            "num_output_tokens": self.num_output_tokens,
            "s": self.median_s,
            "turns_s": self.turns_s,
        }


def compare(
    runs: dict[str, Run],
    jobs: Sequence[Job],
    repeats: int,
    *,
    around_first: Callable[[], object] = lambda: None,
) -> Compared:
    """Medians of `repeats` alternating runs, after one run of each that does not count.

    Calls `around_first` before and after each run of the first way, while no clock runs.
    """
    elapsed_s: dict[str, list[float]] = {name: [] for name in runs}
    first = next(iter(runs))
    for _ in range(repeats + 1):
        for name, run in runs.items():
            if name == first:
                around_first()
            start_s = time.perf_counter()
            run(jobs)
            elapsed_s[name].append(time.perf_counter() - start_s)
            if name == first:
                around_first()
    return Compared(
        num_jobs=len(jobs),
        num_input_tokens=sum(len(job.prompt_ids) for job in jobs),
        num_output_tokens=sum(job.num_output_tokens for job in jobs),
        turns_s={name: times[1:] for name, times in elapsed_s.items()},
    )


def compared_text(rows: Sequence[Compared]) -> str:
    """A table of each way's output tokens per second, and the first way's ratio to it."""
    first, *others = rows[0].median_s
    repeats = len(rows[0].turns_s[first])
    header = ["prompts", first]
    for name in others:
        header += [name, "ratio"]
    lines = []
    for row in rows:
        rate = {name: row.num_output_tokens / s for name, s in row.median_s.items()}
        cells = [str(row.num_jobs), figure(rate[first])]
        for name in others:
            cells += [figure(rate[name]), f"{rate[first] / rate[name]:.2f}"]
        lines.append(cells)
    said = f"output tokens per second, medians of {repeats} turns; ratio: {first} over the other"
    return f"{table(header, lines)}\n\n{said}\n"


def require_transformers() -> None:
    """Raises ValueError, before anything is loaded, if torch or transformers is missing."""
    for name in ("torch", "transformers"):
        if find_spec(name) is None:
            raise ValueError(
                f"--compare needs torch and transformers; got an environment without {name}. "
                'Do: pip install "jinfer[agreement]".'
            )


@contextmanager
def transformers_runs(
    folder: Path, ways: Collection[str] = WAYS, *, dummy: bool, dtype: str
) -> Iterator[dict[str, Run]]:
    """Yields the ways of transformers, on as many threads as there are processors.

    Args:
      folder: of the model, in Hugging Face layout.
      ways: a subset of `WAYS`.
      dummy: use random weights of the model's shape.
      dtype: of the weights.
    """
    assert ways and set(ways) <= set(WAYS), f"{ways=}"
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    loader, torch_dtype = transformers.AutoModelForCausalLM, getattr(torch, dtype)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = (
        loader.from_config(transformers.AutoConfig.from_pretrained(folder))
        if dummy
        else loader.from_pretrained(folder)
    )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", torch_dtype).eval()
    model.generation_config.eos_token_id = None  # every answer has the length asked for
    model.generation_config.pad_token_id = 0
    runs: dict[str, Run] = {GENERATE: _generate(model, torch)} if GENERATE in ways else {}
    if CONTINUOUS not in ways:
        yield runs
        return
    with _continuous(_twin(model, loader), transformers) as continuous:
        yield {**runs, CONTINUOUS: continuous}


def _twin(model: Any, loader: Any) -> Any:
    """The same parameters in another module, since continuous batching changes its attention."""
    twin = loader.from_config(copy.deepcopy(model.config)).to(model.dtype).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    return twin


def _generate(model: Any, torch: Any) -> Run:
    """Runs `generate`: pads a batch to its longest prompt and runs to its longest answer."""

    @torch.no_grad()
    def run(jobs: Sequence[Job]) -> None:
        for start in range(0, len(jobs), GENERATE_ROWS):
            batch = jobs[start : start + GENERATE_ROWS]
            longest = max(len(job.prompt_ids) for job in batch)
            pads = [longest - len(job.prompt_ids) for job in batch]
            rows = [[0] * pad + list(job.prompt_ids) for pad, job in zip(pads, batch, strict=True)]
            mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
            most = max(job.num_output_tokens for job in batch)
            model.generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=most,
                min_new_tokens=most,
                do_sample=False,
            )

    return run


@contextmanager
def _continuous(model: Any, transformers: Any) -> Iterator[Run]:
    """Yields continuous batching with one manager for all runs; answers have the length asked."""
    config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1024
    )
    with model.continuous_batching_context_manager(generation_config=config) as manager:

        def run(jobs: Sequence[Job]) -> None:
            for job in jobs:
                manager.add_request(list(job.prompt_ids), max_new_tokens=job.num_output_tokens)
            num_left = len(jobs)
            while num_left:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("transformers' continuous batching ended early")
                    continue
                if result.error is not None:
                    raise RuntimeError(f"transformers' continuous batching: {result.error}")
                num_left -= result.is_finished()

        yield run
