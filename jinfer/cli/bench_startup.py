"""`jinfer bench startup`."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from jinfer.bench.machine import machine_line, versions
from jinfer.bench.models import model_arguments
from jinfer.bench.startup import measure_startup, startup_text
from jinfer.bench.startup_ahead import ahead_text, measure_ahead
from jinfer.cli.arguments import engine_args
from jinfer.cli.screen import counted, note, show
from jinfer.config import EngineConfig
from jinfer.shipped import find_shipped
from jinfer.weights.hub import resolve_model


def run(args: Namespace) -> dict[str, Any]:
    """Prints the table; returns every figure for the JSON file."""
    if "compilation_cache" in args:
        raise ValueError(
            "startup makes a folder of its own, to start cold; got "
            f"--compilation-cache {args.compilation_cache}. Leave it out."
        )
    say = (lambda said: None) if args.quiet else note
    if args.target is not None:
        return _ahead(args, say)
    figures = measure_startup(args.model, engine_args(args), say)
    # The measured processes use the device; this process never opens it.
    device = figures["cold"]["device"]
    show(f"{device}; {machine_line(with_device=False)}\n{args.model}\n\n{startup_text(figures)}\n")
    return {"benchmark": "startup", "model": args.model, **versions(), **figures}


def _ahead(args: Namespace, say: Callable[[str], object]) -> dict[str, Any]:
    with model_arguments(args.model) as keywords:
        name = keywords["model"]
        folder = find_shipped(name) or resolve_model(name)
        config = EngineConfig(**{**keywords, **engine_args(args)})
        plan, figures = measure_ahead(args.target, config, folder, say)
    show(f"{machine_line(with_device=False)}\n{args.model} for {args.target}: ")
    show(f"{counted(plan.max_slots, 'sequence')} at once, {plan.attention} attention\n\n")
    show(f"{ahead_text(figures)}\n{_NOTES}")
    told = {name: asdict(each) for name, each in figures.items()}
    return {
        "benchmark": "startup",
        "model": args.model,
        "target": args.target,
        **versions(),
        **told,
    }


_NOTES = """
cold: compiled and stored, one program per processor at a time. warm: found in the cache, read,
checked and unpacked; loading is not included, because it needs the chip.
"""
