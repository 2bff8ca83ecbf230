"""Plots one run; needs matplotlib, from the `bench` extra."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from jinfer.bench.runner import Recording


def require_matplotlib(path: str) -> None:
    """Raises ValueError, before the run, without matplotlib or for a format it cannot write.

    Args:
      path: of the picture; its ending is the format.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            "--plot needs matplotlib; got an environment without it. "
            'Do: pip install "jinfer[bench]".'
        )
    from matplotlib.backend_bases import (  # pyright: ignore[reportMissingImports]
        FigureCanvasBase,
    )

    endings = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in endings:
        raise ValueError(
            f"--plot draws {', '.join(sorted(endings))}; got {path!r}. Name such a file."
        )


def plot(recordings: Sequence[Recording], path: str, *, title: str) -> None:
    """Plots the distribution of the times, and the tokens per second.

    Args:
      recordings: consecutive runs.
      path: of the picture; its ending is the format.
      title: of the picture.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("agg")  # writes files and needs no screen
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    served = [one for recording in recordings for one in recording.served]
    columns = {
        "TTFT": [one.ttft_s for one in served],
        "TPOT": [one.tpot_s for one in served if one.tpot_s is not None],
        "ITL": [gap for one in served for gap in one.itl_s],
    }
    figure, (times, rates) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values in columns.items():
        if values:
            shares = np.arange(1, len(values) + 1) / len(values)
            times.step(np.sort(values) * 1e3, shares, where="post", label=name)
    times.set(xlabel="milliseconds", ylabel="share at or below", ylim=(0, 1))
    times.set_xscale("symlog", linthresh=0.1)
    times.set_xlim(0, None)
    times.legend()
    start_s = min(one.arrived_s for one in served)
    token_s = [one.arrived_s + s - start_s for one in served for s in one.token_s]
    num_bins = 50
    counts, edges = np.histogram(token_s, bins=num_bins)
    rates.stairs(counts / np.diff(edges), edges)
    rates.set(xlabel="seconds", ylabel="output tokens per second", ylim=(0, None))
    figure.suptitle(title)
    figure.savefig(path)
    pyplot.close(figure)
