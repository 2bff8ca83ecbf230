"""Sets up JAX's persistent compilation cache so that every program hits it."""

import os
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_compilation_cache(folder: str | Path | None) -> None:
    """Makes JAX keep compiled programs in `folder`, so that the next start reads them.

    An engine's own programs go into a folder inside it; see `jinfer.compile.program_store`.

    If `folder` is None, a folder from the user's JAX configuration stays; the limits on the time
    and size of its entries are set here in any case.

    Args:
      folder: created if missing; None = jinfer's folder in the user's cache directory.

    Raises:
      ValueError: `folder` cannot be created.
    """
    current: str | None = jax.config.values["jax_compilation_cache_dir"]
    # By default JAX skips programs that compile in under a second: together, most of the time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if folder is None and current:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(folder) if folder is not None else base / "jinfer" / "xla"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"got {str(path)!r}: {error.strerror}"
        if folder is not None:
            raise ValueError(
                f"compilation_cache must be a folder that can be made; {problem}. Name another."
            ) from None
        warnings.warn(
            f"compiled programs are not kept; {problem}. Set compilation_cache=<a folder>.",
            stacklevel=2,
        )
        return
    if current != str(path):
        jax.config.update("jax_compilation_cache_dir", str(path))
        compilation_cache.reset_cache()  # JAX fixes the folder at its first compilation
