"""The commands and flags of `jinfer bench`."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from jinfer.shipped import DEFAULT_MODEL

_BENCH = """\
Measures speed against the hardware's limit. Each command prints a table; --json FILE writes the
same figures as JSON. Compare timings of one run only, as ratios.
"""
_KERNELS = """\
Times paged attention at serving shapes, in one compiled loop, and compares it with a large copy
and a large matrix product measured in the same run. Results are checked first; a wrong one makes
the exit status 1. With --target nothing runs: the kernels are compiled for that chip, which need
not be present, and the compiler's figures are printed beside the chip's bound. Without an
accelerator this is the default, for a chip with an installed compiler; --implementation xla times
a smaller set of cases on the CPU.
"""
_LATENCY = """\
Time of one batch, alone. The batch is sent and completed, then sent again with new prompts. The
first run is not counted.
"""
_THROUGHPUT = """\
Tokens per second when all requests are sent at the start. --compare runs transformers in turns on
the same prompts: its generate and its continuous batching, or the one you name.
"""
_SERVE = """\
Latencies that users of a service see. Requests arrive at random times, --rate per second on
average, or as in a trace, at most --max-concurrency at once; tokens are streamed one by one.
"""
_STARTUP = """\
Time from the command to the first token, in new processes: cold, with an empty compilation cache,
then warm, with the programs of the cold run. With --target nothing runs: the engine's programs are
compiled for that chip, which need not be present, and read back from the cache.
"""
# The flags that set the lengths of each workload; their defaults are in LENGTH_DEFAULTS.
LENGTHS_OF = {
    "fixed": ("input_tokens", "output_tokens"),
    "sharegpt": (),
    "trace": ("scale",),
    "shared-prefix": ("input_tokens", "output_tokens", "shared_tokens"),
}
COMPARED_WAYS = ("generate", "continuous-batching")
LENGTH_DEFAULTS = {"input_tokens": 128, "output_tokens": 128, "shared_tokens": 96, "scale": 1.0}


def add_bench(parser: Any, formatter: Any, add_engine: Callable[[Any], None]) -> dict[str, Any]:
    """Adds the commands of `jinfer bench` to its parser; returns them by name.

    Args:
      parser: parser of `jinfer bench`.
      formatter: class that formats the help texts.
      add_engine: adds the engine's flags to a parser.
    """
    parser.description = _BENCH
    subparsers = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", title="benchmarks")
    described: dict[str, tuple[str, str, Callable[[Any], None]]] = {
        "latency": ("one batch, alone", _LATENCY, _add_latency),
        "throughput": ("many requests at once", _THROUGHPUT, _add_throughput),
        "serve": ("requests that arrive over time", _SERVE, _add_serve),
        "startup": ("from the command to the first token", _STARTUP, _add_startup),
        "kernels": ("attention kernels, against copy and matrix product", _KERNELS, _add_kernels),
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
        _add_report(command, plots=name not in ("kernels", "startup"), profiles=name != "startup")
        if name != "kernels":
            add_engine(command)
        commands[f"bench {name}"] = command
    return commands


def _add_report(parser: Any, *, plots: bool, profiles: bool) -> None:
    add = partial(_flag, parser.add_argument_group("report"))
    add("json", metavar="FILE", help="write every figure to this file; default: none")
    if plots:
        add("plot", metavar="FILE", help="plot times and rates (needs matplotlib); default: none")
    if profiles:
        add(
            "profile",
            metavar="FOLDER",
            help="write a trace for jax.profiler's viewers; default: none",
        )


def _add_model(parser: Any) -> None:
    _flag(
        parser,
        "model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a folder, a hub name, a shipped model, or random weights of a size: 125m, 8b; "
        f"default: {DEFAULT_MODEL}",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="only tables and errors")


def _add_latency(parser: Any) -> None:
    _add_model(parser)
    add, count = partial(_flag, parser), {"metavar": "N", "type": _positive}
    add("batch-size", **count, default=1, help="requests of one batch; default: 1")
    add("input-tokens", **count, default=32, help="tokens of each prompt; default: 32")
    add("output-tokens", **count, default=128, help="tokens of each answer; default: 128")
    add("repeats", **count, default=5, help="batches; default: 5")
    add("stream", action="store_true", help="stream every token: one step per dispatch")
    add("seed", metavar="N", type=int, default=0, help="for the prompts; default: 0")


def _add_workload(parser: Any) -> None:
    _add_model(parser)
    add = partial(_flag, parser.add_argument_group("workload"))
    count = {"metavar": "N", "type": _positive}
    add(
        "workload",
        choices=tuple(LENGTHS_OF),
        default="fixed",
        metavar="NAME",
        help="fixed lengths (default), sharegpt (log-normal, its means), trace, shared-prefix",
    )
    add(
        "num-prompts",
        **count,
        nargs="+",
        default=[64],
        help="requests; one run for each N; default: 64",
    )
    add("input-tokens", **count, help="for fixed and shared-prefix; default: 128")
    add("output-tokens", **count, help="for fixed and shared-prefix; default: 128")
    add("shared-tokens", **count, help="for shared-prefix: common to all prompts; default: 96")
    add("trace", metavar="FILE", help="a CSV of the Azure LLM inference traces; default: none")
    add("scale", metavar="X", type=float, help="factor on the trace's lengths; default: 1")
    add("seed", metavar="N", type=int, default=0, help="for lengths, prompts, arrivals; default: 0")


def _add_throughput(parser: Any) -> None:
    _add_workload(parser)
    add = partial(_flag, parser)
    add(
        "compare",
        nargs="*",
        choices=COMPARED_WAYS,
        metavar="WAY",
        help="also run transformers (needs torch): generate, continuous-batching, or both if no "
        "way is named; default: jinfer alone",
    )
    add("repeats", metavar="N", type=_positive, help="turns of --compare; default: 3")


def _add_serve(parser: Any) -> None:
    _add_workload(parser)
    said = (
        "requests per second, inf = all at the start; default: the trace's times, "
        "inf with --max-concurrency, else 1"
    )
    _flag(parser, "rate", metavar="X", type=float, help=said)
    _flag(
        parser,
        "max-concurrency",
        metavar="N",
        type=_positive,
        help="most unanswered requests; others wait, and their times count from the end of "
        "waiting; default: no limit",
    )
    _flag(
        parser,
        "goodput",
        metavar="NAME:MS",
        nargs="+",
        help="count requests within ttft:MS tpot:MS e2el:MS; default: the engine's targets",
    )


def _add_startup(parser: Any) -> None:
    _add_model(parser)
    said = "only compile for v6e, h200, ..., which need not be present; default: start here"
    _flag(parser, "target", metavar="CHIP", help=said)


def _add_kernels(parser: Any) -> None:
    add = partial(_flag, parser)
    add(
        "cases",
        metavar="NAME",
        nargs="+",
        default=[],
        help='only these; patterns such as "decode_16*" (quoted) match several; default: all',
    )
    add(
        "implementation",
        metavar="NAME",
        nargs="+",
        default=[],
        help="only these; default: all of the platform",
    )
    said = "only compile, for v6e, h200, ...; default: time here, if there is an accelerator"
    add("target", metavar="CHIP", nargs="+", default=[], help=said)
    add("dtype", metavar="NAME", help="of activations; default: float32 on CPU, else bfloat16")
    add("page-size", metavar="N", type=_positive, help="tokens per page; default: 64 on TPU, or 16")
    add("repeats", metavar="N", type=_positive, default=5, help="loops per median; default: 5")


def _flag(group: Any, name: str, **settings: Any) -> None:
    group.add_argument(f"--{name}", **settings)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1; got {text!r}")
    return int(text)
