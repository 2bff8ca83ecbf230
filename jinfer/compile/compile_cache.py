"""The persistent compilation cache, set up so that it is really hit."""

import os
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_compilation_cache(folder: str | Path | None) -> None:
    """Makes JAX keep compiled programs in `folder`, so that the next start reads them.

    An engine's own programs go into a folder inside it; see `jinfer.compile.program_store`.

    A folder that the user's own JAX configuration names already is kept when `folder` is None;
    what goes into it is then decided here all the same.

    Args:
      folder: created when missing; None = jinfer's place in the user's cache directory.

    Raises:
      ValueError: the folder that was asked for cannot be made.
    """
    current: str | None = jax.config.values["jax_compilation_cache_dir"]
    # By default programs that compile in under a second are not kept; together they are most of it.
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
        compilation_cache.reset_cache()  # JAX settles on a folder, or on none, at its first compile
