"""What may be written after `jinfer bench`."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

_BENCH = """\
Measures, and says how close to the limit: each command prints a table, and with --json FILE
writes the same figures as JSON. Timings of one run belong together; compare them as ratios.
"""
_KERNELS = """\
Times paged attention at the shapes that serving asks for, each call inside one compiled loop, and
sets it against a large copy and a large matrix product measured in the same run. On a CPU a
scaled-down set is timed. With --target nothing runs: the kernels are compiled for that chip,
which need not be here, and what the compiler says is printed beside the chip's own bound.
"""


def add_bench(parser: Any, formatter: Any) -> dict[str, Any]:
    """Adds the commands of `jinfer bench` to its parser; returns them by name."""
    parser.description = _BENCH
    subparsers = parser.add_subparsers(
        dest="benchmark", required=True, metavar="BENCHMARK", title="benchmarks"
    )
    described: dict[str, tuple[str, str, Callable[[Any], None]]] = {
        "kernels": ("attention kernels, against copy and product", _KERNELS, _add_kernels),
    }
    commands = {}
    for name, (short, long, add_flags) in described.items():
        command = subparsers.add_parser(
            name,
            usage=f"jinfer bench {name} [flags]",
            help=short,
            description=long,
            formatter_class=formatter,
            allow_abbrev=False,
        )
        add_flags(command)
        _add_report(command)
        commands[f"bench {name}"] = command
    return commands


def _add_report(parser: Any) -> None:
    add = partial(_flag, parser.add_argument_group("report"))
    add("json", metavar="FILE", help="write every figure to this file")


def _add_kernels(parser: Any) -> None:
    add = partial(_flag, parser)
    add(
        "cases",
        metavar="NAME",
        nargs="+",
        default=[],
        help='only these; patterns such as "decode_16*" (in quotes) match several',
    )
    add(
        "implementation",
        metavar="NAME",
        nargs="+",
        default=[],
        help="only these; default: what the platform has",
    )
    add("target", metavar="CHIP", nargs="+", default=[], help="compile for v6e, h200, ...; no run")
    add("dtype", metavar="NAME", help="of activations; default: float32 on CPU, else bfloat16")
    add("page-size", metavar="N", type=_positive, help="tokens per page; default: 64 on TPU, or 16")
    add("repeats", metavar="N", type=_positive, default=5, help="loops per median; default: 5")


def _flag(group: Any, name: str, **settings: Any) -> None:
    group.add_argument(f"--{name}", **settings)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on; got {text!r}")
    return int(text)
