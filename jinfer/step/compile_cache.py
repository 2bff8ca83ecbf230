"""The persistent compilation cache, set up so that it is really hit."""

import os
from pathlib import Path

import jax


def use_compilation_cache(folder: str | Path | None) -> None:
    """Makes XLA keep compiled programs in `folder`, so that the next start reads them.

    A folder that the user's own JAX configuration names already is kept when `folder` is None.

    Args:
      folder: created when missing; None = jinfer's place in the user's cache directory.
    """
    if folder is None and jax.config.jax_compilation_cache_dir:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(folder) if folder is not None else base / "jinfer" / "xla"
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # By default programs that compile in under a second are not kept; together they are most of it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
