"""Workloads of benchmarks: prompts, lengths of answers, and arrival times."""

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

Lengths = list[tuple[int, int]]  # tokens of the prompt and of the answer

# ShareGPT conversations as measured by Kwon et al. (arXiv:2309.06180, section 6.1): on average 161
# tokens of prompt and 338 of answer. The distribution and its spread (standard deviation of the
# logarithm) are ours: most are short, some very long. Both are clipped to 4 .. 1024, as is usual.
SHAREGPT_MEAN = (161.0, 338.0)
SHAREGPT_SPREAD = (1.2, 0.9)
SHAREGPT_RANGE = (4, 1024)
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request."""

    prompt_ids: tuple[int, ...]
    num_output_tokens: int
    arrival_s: float = 0.0  # after the start


def sharegpt_lengths(num_jobs: int, rng: np.random.Generator) -> Lengths:
    """Log-normal lengths with ShareGPT's means; see SHAREGPT_MEAN."""
    columns = []
    for mean, spread in zip(SHAREGPT_MEAN, SHAREGPT_SPREAD, strict=True):
        # The mean of exp(normal(m, s)) is exp(m + s^2 / 2).
        drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, num_jobs)
        columns.append(np.clip(np.rint(drawn), *SHAREGPT_RANGE).astype(int).tolist())
    return list(zip(*columns, strict=True))


def read_trace(path: str | Path, num_jobs: int, scale: float) -> tuple[Lengths, list[float]]:
    """Lengths and arrivals of the first requests of an Azure LLM inference trace.

    Args:
      path: a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens.
      num_jobs: the most requests to read.
      scale: factor on both lengths, which are rounded to at least 1 token.

    Raises:
      ValueError: the file has another form.
    """
    lengths, moments = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                if len(lengths) == num_jobs:
                    break
                moment, num_input, num_output = (row[name] for name in _COLUMNS)
                lengths.append((_scaled(num_input, scale), _scaled(num_output, scale)))
                # The trace has seven digits of a second's fraction; datetime reads six.
                moments.append(datetime.fromisoformat(moment[:26]).timestamp())
    except (OSError, KeyError, TypeError, ValueError) as error:  # TypeError: a row is too short
        raise ValueError(
            f"--trace must be a CSV file with the columns {', '.join(_COLUMNS)}; got "
            f"{str(path)!r}: {error}. Name one of the Azure LLM inference traces."
        ) from None
    if not lengths:
        raise ValueError(f"--trace must hold requests; got none in {str(path)!r}. Name another.")
    return lengths, [moment - moments[0] for moment in moments]


def _scaled(num_tokens: str, scale: float) -> int:
    return max(1, round(int(num_tokens) * scale))


def poisson_arrivals(num_jobs: int, rate: float, rng: np.random.Generator) -> list[float]:
    """Arrivals in seconds after the start, the first at 0; on average `rate` per second.

    An infinite rate: all at 0.
    """
    gaps = rng.exponential(1 / rate, num_jobs)
    gaps[:1] = 0
    return np.cumsum(gaps).tolist()


def fitted(lengths: Lengths, max_model_len: int) -> tuple[Lengths, int]:
    """Lengths cut to fit the context, answers first, down to a half of it; and the number cut."""
    cut = []
    for num_input, num_output in lengths:
        room = max(max_model_len - num_input, max_model_len // 2)
        num_output = min(num_output, room)
        cut.append((min(num_input, max_model_len - num_output), num_output))
    return cut, sum(before != after for before, after in zip(lengths, cut, strict=True))


def make_jobs(
    lengths: Lengths,
    *,
    vocab_size: int,
    rng: np.random.Generator,
    arrivals: list[float] | None = None,
    num_shared: int = 0,
) -> list[Job]:
    """Jobs with prompts of random tokens, since the time of a step does not depend on them.

    Args:
      lengths: of every prompt and answer.
      vocab_size: token ids are random from 3, past the usual special tokens, to below this.
      rng: source of the random tokens.
      arrivals: of every job; None = all at the start.
      num_shared: leading tokens that all prompts share, up to their own lengths.
    """
    shared = rng.integers(3, vocab_size, num_shared)
    jobs = []
    for i, (num_input, num_output) in enumerate(lengths):
        own = rng.integers(3, vocab_size, max(0, num_input - num_shared))
        prompt_ids = tuple(np.concatenate([shared, own])[:num_input].tolist())
        arrival_s = 0.0 if arrivals is None else arrivals[i]
        jobs.append(Job(prompt_ids=prompt_ids, num_output_tokens=num_output, arrival_s=arrival_s))
    return jobs
