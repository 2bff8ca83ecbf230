"""Traces of what the device does, for the viewers of `jax.profiler`."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def profiled(folder: str | None) -> Iterator[None]:
    """Writes a trace of the block to `folder`; None = none.

    The parts of a step carry their names there, such as "paged_attention" and "sample". Open it
    with XProf (`pip install xprof`) or at ui.perfetto.dev.

    Raises:
      ValueError: the folder cannot be written.
    """
    if folder is None:
        yield
        return
    jax.profiler.start_trace(folder)
    try:
        yield
    finally:
        _stop(folder)


def _stop(folder: str) -> None:
    try:
        jax.profiler.stop_trace()
    except RuntimeError as error:
        raise ValueError(
            f"--profile needs a folder that can be written; got {folder!r}: {error}. Name another."
        ) from None
