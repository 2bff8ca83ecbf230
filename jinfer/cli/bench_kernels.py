"""`jinfer bench kernels`."""

from argparse import Namespace
from dataclasses import asdict
from typing import Any

import jax

from jinfer.bench.baselines import names_for
from jinfer.bench.ceilings import measure_ceilings
from jinfer.bench.chips import chip_named, default_target
from jinfer.bench.kernel_cases import Case, chosen
from jinfer.bench.kernels import (
    IMPLEMENTATIONS,
    Result,
    check_names,
    page_size_of,
    time_case,
    timing_table,
)
from jinfer.bench.kernels_ahead import check_targets, compile_cases, compiled_table
from jinfer.bench.machine import machine_line, versions
from jinfer.cli.profile import profiled, require_profile_folder
from jinfer.cli.screen import note, show
from jinfer.startup.defaults import platform_of
from jinfer.startup.memory import free_device_bytes

_DTYPES = ("float32", "bfloat16", "float16")


def run(args: Namespace) -> dict[str, Any]:
    """Prints the tables; returns every figure for the JSON file."""
    check_names(args.implementation)
    if args.dtype not in (None, *_DTYPES):
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}; got {args.dtype!r}.")
    if args.target:
        return _compile(args, args.target)
    device = jax.devices()[0]
    platform = platform_of(device)
    if platform == "cpu" and not args.cases and not args.implementation:
        if (target := default_target()) is not None:
            note(f"no accelerator: compiling for {target}; --implementation xla times the CPU")
            return _compile(args, [target])
        note(
            "no accelerator, and no compiler for one: timing the CPU. To compile for a chip: "
            'pip install "jinfer[tpu]", or "jinfer[cuda13]"'
        )
    require_profile_folder(args.profile)
    return _time(args, device, platform)


def _time(args: Namespace, device: jax.Device, platform: str) -> dict[str, Any]:
    dtype = args.dtype or ("float32" if platform == "cpu" else "bfloat16")
    cases = chosen(args.cases, small=platform == "cpu", dtype=dtype)
    ceilings = measure_ceilings(platform, dtype)
    with profiled(args.profile):
        results = [
            _time_one(args, case, name, device, dtype)
            for case in cases
            for name in args.implementation or names_for(case, IMPLEMENTATIONS[platform], platform)
        ]
    pages = f"pages of {args.page_size} tokens" if args.page_size else "pages of the engine's size"
    show(f"{machine_line()}\n{dtype}, {pages}; 32 query heads, 8 kv heads of head_dim 128")
    show(f"\nin the same run: {ceilings}\n\n{timing_table(results, ceilings)}\n\n")
    show(_TIMING_NOTES)
    wrong = [f"{result.case}, {result.implementation}" for result in results if result.is_wrong]
    for named in wrong:
        note(f"{named}: a wrong answer")
    return {
        "benchmark": "kernels",
        **versions(),
        "dtype": dtype,
        "page_size": args.page_size,
        "ceilings": asdict(ceilings),
        "results": [result.as_json(ceilings) for result in results],
        "wrong": wrong,
    }


def _time_one(args: Namespace, case: Case, name: str, device: jax.Device, dtype: str) -> Result:
    note(f"{case.name}, {name}")
    return time_case(
        case,
        name,
        dtype=dtype,
        page_size=args.page_size or page_size_of(case, platform_of(device), dtype),
        free_bytes=free_device_bytes(device),
        num_loops=args.repeats,
    )


def _compile(args: Namespace, targets: list[str]) -> dict[str, Any]:
    if args.profile is not None:
        raise ValueError(
            f"--profile needs kernels that run; got --profile {args.profile} where they are only "
            f"compiled, for {', '.join(targets)}. Drop it, or time with --implementation xla."
        )
    check_targets(targets)
    dtype = args.dtype or "bfloat16"
    cases = chosen(args.cases, small=False, dtype=dtype)
    every = []
    show(f"{machine_line(with_device=False)}\n{dtype}; nothing was run\n")
    for target in targets:
        results = []
        for result in compile_cases(
            cases, target, args.implementation, dtype=dtype, page_size=args.page_size
        ):
            note(f"{target}: {result.case}, {result.implementation}")
            results.append(result)
        chip = chip_named(target)
        show(f"\n{target}: {chip.bandwidth_gb_s:,.0f} GB/s, {chip.tflops:,.0f} TFLOP/s, ")
        show(f"{chip.memory_gb:,.0f} GB, by its maker\n\n{compiled_table(results)}\n")
        every += results
    show(_COMPILED_NOTES)
    return {
        "benchmark": "kernels",
        **versions(),
        "dtype": dtype,
        "compiled": [asdict(result) for result in every],
    }


_TIMING_NOTES = """\
error: the largest error of any token, as a fraction of the largest output; WRONG if rounding of the
dtype cannot explain it. us: time of one call, the median over loops, each compiled as one program;
dispatch is subtracted. +-: half the difference between the slowest and the fastest loop. MB, GFLOP:
the least that any implementation moves and computes. bandwidth, peak: fraction of the rate that the
large copy or read, and the matrix product, reach.
triton, cudnn: kernels of other projects, which do not write to the KV cache; cudnn reads one
layer's pages, which may stay in the chip's cache.
"""
_COMPILED_NOTES = """
bound: the least MB and GFLOP of any implementation, divided by the maker's rates; not an estimate
of the real time. temporary: memory besides the arguments. pool: whether the pages are updated in
place. If a chip appears as two devices, a line is for one device. Errors and times need the chip.
triton, cudnn: kernels of other projects, which do not write to the KV cache.
"""
