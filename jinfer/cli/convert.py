"""`jinfer convert`: a model folder as an Orbax checkpoint."""

import time
from argparse import Namespace
from pathlib import Path

import jax
from tqdm import tqdm

from jinfer.cli.screen import binary_size, counted, note
from jinfer.errors import CheckpointError
from jinfer.shipped import find_shipped
from jinfer.weights.convert import convert as convert_folder
from jinfer.weights.hub import resolve_model


def convert(args: Namespace) -> int:
    """Writes the folder; returns 0."""
    _require_local(args.target)
    jax.config.update("jax_platforms", "cpu")  # from files to files: no accelerator needed
    source = find_shipped(args.model) or resolve_model(args.model)
    target = Path(args.target).expanduser()
    start_s = time.monotonic()
    # disable=None: a bar on a terminal only, not in a file or pipe.
    with tqdm(desc="saving", unit=" arrays", disable=True if args.quiet else None) as bar:
        written = convert_folder(
            source, target, dtype=args.dtype, on_saved=lambda name: bar.update()
        )
    if not args.quiet:
        elapsed_s = time.monotonic() - start_s
        note(
            f"saved {counted(written.num_arrays, 'array')}, {binary_size(written.num_bytes)}, "
            f"in {elapsed_s:.1f} s to {target}"
        )
    return 0


def _require_local(target: str) -> None:
    """Refuses URLs: `Path` would make local folders of their parts."""
    if "://" in target:
        raise CheckpointError(
            f"a conversion writes a local folder; got the URL {target!r}. Convert to a local "
            "folder, then copy that, for example with `gcloud storage cp --recursive`."
        )
