"""Plots one run; needs matplotlib, from the `bench` extra."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from jinfer.bench.runner import Recording, Served


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
    edges_s, rate = token_rates(recordings)
    rates.stairs(rate, edges_s)
    mean = sum(len(one.token_s) for one in served) / sum(r.elapsed_s for r in recordings)
    rates.axhline(mean, linestyle="--", linewidth=1, color="gray", label=f"mean {mean:,.0f}")
    rates.set(xlabel="seconds", ylabel="output tokens per second", ylim=(0, None))
    rates.legend()
    figure.suptitle(title)
    figure.savefig(path)
    pyplot.close(figure)


def token_rates(
    recordings: Sequence[Recording], num_bins: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """The edges of equal bins, in seconds, and the output tokens per second in each.

    The tokens of one dispatch come at once. They count as spread evenly over the time since the
    dispatch before, or since the request arrived at an idle engine. So the bars show the speed, and
    add up to all tokens, however short they are.
    """
    served = [one for recording in recordings for one in recording.served]
    token_s = np.sort([one.arrived_s + s for one in served for s in one.token_s])
    # The number of tokens so far grows between these moments, and stands still in idle times.
    moments_s = np.unique([*_busy_from(served), *token_s])
    num_so_far = np.searchsorted(token_s, moments_s, side="right")
    edges_s = np.linspace(moments_s[0], moments_s[-1], num_bins + 1)
    counts = np.diff(np.interp(edges_s, moments_s, num_so_far))
    return edges_s - edges_s[0], counts / np.diff(edges_s)


def _busy_from(served: Sequence[Served]) -> list[float]:
    """The arrivals that found no other request."""
    moments_s, busy_until_s = [], -math.inf
    for one in sorted(served, key=lambda one: one.arrived_s):
        if one.arrived_s > busy_until_s:
            moments_s.append(one.arrived_s)
        busy_until_s = max(busy_until_s, one.arrived_s + one.e2e_s)
    return moments_s
