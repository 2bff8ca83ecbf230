"""Traces of the device's work, for the viewers of `jax.profiler`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


@contextmanager
def profiled(folder: str | None) -> Iterator[None]:
    """Writes a trace of the block to `folder`; None = no trace.

    The trace names each program ("decode_of_32_rows") and the parts of a step: "embed",
    "attention", "paged_attention" inside it, "mlp", "logits", "sample", "logprobs".
    Open it with XProf (`pip install xprof`) or at ui.perfetto.dev.

    Raises:
      ValueError: the folder cannot be written.
    """
    if folder is None:
        yield
        return
    require_profile_folder(folder)
    jax.profiler.start_trace(folder)
    try:
        yield
    finally:
        _stop(folder)


def require_profile_folder(folder: str | None) -> None:
    """Makes the folder; raises ValueError if no trace can be written there."""
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write there")
    except OSError as error:
        raise ValueError(_unwritable(folder, error)) from None


def _stop(folder: str) -> None:
    try:
        jax.profiler.stop_trace()
    except RuntimeError as error:
        raise ValueError(_unwritable(folder, error)) from None


def _unwritable(folder: str, error: Exception) -> str:
    return f"--profile needs a folder that can be written; got {folder!r}: {error}. Name another."
