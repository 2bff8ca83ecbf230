"""`jinfer bench`: speed, and the hardware's limit."""

import importlib
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from jinfer.cli.json_text import json_text


def bench(args: Namespace) -> int:
    """Runs one benchmark; returns 0, or 1 if a timed kernel computes a wrong answer."""
    for name in (args.json, getattr(args, "plot", None)):
        if name is not None:
            _check_writable(name)  # now, not after minutes of measuring
    if getattr(args, "target", None):
        # Nothing runs, and an absent chip's compiler has no driver: use the CPU backend.
        os.environ["JAX_PLATFORMS"] = "cpu"
    # Import after that: these modules import JAX.
    home = args.benchmark if args.benchmark in ("kernels", "startup") else "engine"
    module = importlib.import_module(f"jinfer.cli.bench_{home}")
    figures: dict[str, Any] = module.run(args)
    if args.json is not None:
        text = json_text(figures, encoding="utf-8", indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 1 if figures.get("wrong") else 0


def _check_writable(name: str) -> None:
    path = Path(name)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"a report needs a file that can be written; got {name!r}. Name another.")
