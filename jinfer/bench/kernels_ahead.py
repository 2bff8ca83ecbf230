"""Compiles the kernels for a chip that is not present, and computes the chip's bound."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from jinfer.bench.baselines import BASELINES, names_for, variants_of
from jinfer.bench.ceilings import precision_of
from jinfer.bench.chips import chip_named, describe, memory_of, no_compilation_cache
from jinfer.bench.kernel_cases import Work, work_of
from jinfer.bench.kernels import (
    IMPLEMENTATIONS,
    Arguments,
    Shaped,
    arguments,
    one_line,
    page_size_of,
    pages_for,
)
from jinfer.bench.table import figure, table
from kernels_pallas.compat import told_the_chip
from kernels_pallas.paged_attention.cases import Case

NUM_LAYERS = 2  # of the pool, if there is room: two, so that the layer is looked up as in a model


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """One case with one implementation, compiled for a chip, or the reason why not."""

    target: str
    case: str
    implementation: str
    work: Work
    bound_s: float  # from the maker's figures for bandwidth and arithmetic
    bound_by: str  # "bandwidth" | "arithmetic"
    compile_s: float | None = None
    temp_bytes: int | None = None
    pool_bytes: int | None = None  # of all layers
    alias_bytes: int | None = None
    cost: dict[str, float] | None = None  # the compiler's count, which leaves Pallas kernels out
    why_not: str | None = None


def check_targets(targets: Sequence[str]) -> None:
    """Raises for an unknown chip, and for two architectures of GPUs.

    Raises:
      ValueError: which names the chip.
    """
    kinds = {chip_named(name).topology for name in targets if chip_named(name).platform == "gpu"}
    if len(kinds) > 1:
        raise ValueError(
            "--target takes one GPU architecture at a time, since the compiler keeps the first one "
            f"of a process; got {', '.join(targets)}. Run the command once for each."
        )


def compile_cases(
    cases: Sequence[Case], target: str, names: Sequence[str], *, dtype: str, page_size: int | None
) -> Iterator[Compiled]:
    """Compiles every case with every implementation; without names, the platform's own."""
    chip = chip_named(target)
    device, share = describe(target)
    is_hopper = chip.topology.startswith("9.")  # the compiler takes others for a Hopper, or aborts
    for case in cases:
        work = work_of(case, dtype)
        memory_s = chip.bound_s(work.num_bytes, 0, share)
        bound_s = chip.bound_s(work.num_bytes, work.num_flops, share)
        for name in names or names_for(case, IMPLEMENTATIONS[chip.platform], chip.platform):
            result = Compiled(
                target=target,
                case=case.name,
                implementation=name,
                work=work,
                bound_s=bound_s,
                bound_by="bandwidth" if bound_s == memory_s else "arithmetic",
            )
            room = chip.memory_gb * 1e9 * share
            if name == "gpu" and not is_hopper:
                yield replace(result, why_not="compiled ahead of time for Hopper only: h100, h200")
            elif work.pool_bytes > room:
                need_gb, room_gb = work.pool_bytes / 1e9, room / 1e9
                why = f"no room: {need_gb:.0f} GB of pages, {room_gb:.0f} GB on the device"
                yield replace(result, why_not=why)
            else:
                most_layers = BASELINES[name].most_layers if name in BASELINES else None
                num_layers = int(min(most_layers or NUM_LAYERS, room // work.pool_bytes))
                shaped = partial(
                    jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device)
                )
                tokens = page_size or page_size_of(case, chip.platform, dtype)
                yield _compiled(
                    result, case, device, arguments(case, dtype, tokens, num_layers, shaped), shaped
                )


def _compiled(
    result: Compiled, case: Case, device: Any, made: Arguments, shaped: Shaped
) -> Compiled:
    start_s = time.perf_counter()
    try:
        made = replace(made, pages=pages_for(result.implementation, made.pages, shaped))
        precision = jax.default_matmul_precision(precision_of(str(made.q_TNH.dtype)))
        with told_the_chip(device), no_compilation_cache(), precision:
            program = jax.jit(_call(case, result.implementation), donate_argnums=1).lower(
                made.q_TNH, made.pages, made.k_TKH, shaped((), "int32"), made.table_BM, made.rows
            )
            program = program.compile()
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return replace(result, why_not=one_line(error))
    memory = memory_of(program)
    return replace(
        result,
        compile_s=time.perf_counter() - start_s,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        pool_bytes=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(made.pages)),
        cost=_cost(program),
    )


def _call(case: Case, name: str) -> Callable[..., Any]:
    attend = partial(variants_of(name)[0], scale=case.head_dim**-0.5)

    def call(q_TNH, pages, k_TKH, layer, table_BM, rows):
        return attend(q_TNH, k_TKH, k_TKH, pages, layer, table_BM, *rows)

    return call


def _cost(program: jax.stages.Compiled) -> dict[str, float]:
    cost = program.cost_analysis() or {}
    return {name: cost[name] for name in ("flops", "bytes accessed") if name in cost}


HEADER = (
    "case",
    "by",
    "MB",
    "GFLOP",
    "bound us",
    "bound by",
    "compiled in",
    "temporary MB",
    "pool",
)


def compiled_table(results: Sequence[Compiled]) -> str:
    """One line per case and implementation."""
    return table(HEADER, [_row(result) for result in results], left=2)


def _row(result: Compiled) -> tuple[str, ...]:
    named = (result.case, result.implementation)
    if result.temp_bytes is None or result.compile_s is None:
        return (*named, result.why_not or "")
    assert result.alias_bytes is not None and result.pool_bytes is not None, result
    return (
        *named,
        figure(result.work.num_bytes / 1e6),
        figure(result.work.num_flops / 1e9),
        figure(result.bound_s * 1e6),
        result.bound_by,
        f"{result.compile_s:.1f} s",
        figure(result.temp_bytes / 1e6),
        "in place" if result.alias_bytes >= result.pool_bytes else "COPIED",
    )
