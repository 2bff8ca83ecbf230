"""`jinfer bench startup`."""

from argparse import Namespace
from typing import Any

from jinfer.bench.machine import machine_line, versions
from jinfer.bench.startup import measure_startup, startup_text
from jinfer.cli.arguments import engine_args
from jinfer.cli.screen import note, show


def run(args: Namespace) -> dict[str, Any]:
    """Prints the table; returns every figure for the JSON file."""
    if "compilation_cache" in args:
        raise ValueError(
            "startup makes a folder of its own to be cold; got "
            f"--compilation-cache {args.compilation_cache}. Leave it out."
        )
    figures = measure_startup(
        args.model, engine_args(args), (lambda said: None) if args.quiet else note
    )
    # The device belonged to the starts; this process never opens it.
    show(f"{machine_line(with_device=False)}\n{args.model}\n\n{startup_text(figures)}\n")
    return {"benchmark": "startup", "model": args.model, **versions(), **figures}
