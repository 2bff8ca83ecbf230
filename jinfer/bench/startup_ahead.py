"""Times compiling an engine's programs, cold and warm, for a chip that is not present."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
from jax.experimental.compilation_cache import compilation_cache

from jinfer.bench.chips import chip_named, describe, memory_of
from jinfer.bench.startup import program_said
from jinfer.bench.table import figure, table
from jinfer.compile.program_store import ProgramStore, open_store
from jinfer.compile.programs import Program
from jinfer.config import EngineConfig, EnginePlan
from jinfer.parallel.mesh import make_mesh
from jinfer.parallel.model_shards import padded_model
from jinfer.parallel.sharding import Placement
from jinfer.startup.checks import check_config
from jinfer.startup.defaults import resolve_dtype
from jinfer.startup.plan import resolve_plan
from jinfer.startup.programs import state_shapes, step_programs
from jinfer.weights.load import read_model_config
from kernels_pallas.compat import told_the_chip

_FLAGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_raise_persistent_cache_errors": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ahead:
    """One way to get all programs, on as many threads as there are processors."""

    elapsed_s: float  # of all programs together
    processor_s: float  # processor time of all together, independent of other work
    program_s: Mapping[str, float]  # of each program, while others compile too
    temp_bytes: Mapping[str, int]  # memory beside the arguments; of compiled programs only


def measure_ahead(
    target: str, config: EngineConfig, folder: Path, say: Callable[[str], object]
) -> tuple[EnginePlan, dict[str, Ahead]]:
    """Compiles every program of an engine with an empty store, then finds each in the store.

    The warm time lacks one thing: a stored program is read, checked and unpacked, but cannot be
    loaded without its chip.

    Args:
      target: a chip's name; `config` is for one chip.
      config: the user's arguments of the engine.
      folder: of a model; its weights are not read.
      say: called with a line for each program that is done.

    Raises:
      ValueError: the chip is unknown or has no compiler here, or the plan does not fit.
    """
    check_config(config)
    device, share = describe(target)
    chip = chip_named(target)
    model = read_model_config(folder, weights=False, overrides=config.hf_overrides)
    padded = padded_model(model, 1)
    itemsize = jax.numpy.dtype(resolve_dtype(config, chip.platform)).itemsize
    plan = resolve_plan(
        config,
        model,
        platform=chip.platform,
        free_bytes=int(chip.memory_gb * 1e9 * share) - itemsize * model.num_parameters,
        device_kind=device.device_kind,
    )
    placement = Placement(make_mesh([device], 1))
    programs = step_programs(plan, model, state_shapes(plan, padded, placement), placement)

    def get(program: Program, store: ProgramStore) -> tuple[float, int | None]:
        start_s = time.perf_counter()
        with told_the_chip(device):
            temp_bytes = _temp_bytes(program, store)
        elapsed_s = time.perf_counter() - start_s
        found = " from the store" if temp_bytes is None else ""
        say(f"{program.name}, {elapsed_s:.2f} s{found}")
        return elapsed_s, temp_bytes

    with _cache_in_new_folder():
        store = open_store([device])
        if store is None:
            raise ValueError(
                "startup --target needs the sources of jinfer, unchanged since they were "
                "imported; got none, or changed ones. Run it again."
            )
        into = partial(get, store=store)
        return plan, {name: _get_all(programs, into) for name in ("cold", "warm")}


def _get_all(
    programs: Sequence[Program], get: Callable[[Program], tuple[float, int | None]]
) -> Ahead:
    jax.clear_caches()  # of earlier traces
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = dict(zip([p.name for p in programs], pool.map(get, programs), strict=True))
    return Ahead(
        elapsed_s=time.perf_counter() - begun_s,
        processor_s=time.process_time() - begun_cpu_s,
        program_s={name: s for name, (s, _) in results.items()},
        temp_bytes={name: b for name, (_, b) in results.items() if b is not None},
    )


def _temp_bytes(program: Program, store: ProgramStore) -> int | None:
    """Compiles a program and returns its temporary bytes; None if the store has the program."""
    described = program.description  # None for a simulated kernel, which is never stored
    if described is not None and store.read(described) is not None:
        return None
    lowered = program.lower()
    with store.alone():
        compiled = program.compile(lowered)
    text = program.lowered_text(lowered)
    if described is not None and text is not None:
        store.save(described, text, compiled)
    return memory_of(compiled).temp_size_in_bytes


@contextmanager
def _cache_in_new_folder() -> Iterator[None]:
    with TemporaryDirectory() as folder:
        flags = {**_FLAGS, "jax_compilation_cache_dir": folder}
        before = {name: jax.config.values[name] for name in flags}
        try:
            for name, value in flags.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def ahead_text(figures: Mapping[str, Ahead]) -> str:
    """The table, for 100 columns."""
    cold, warm = figures["cold"], figures["warm"]
    lines = [
        (
            program_said(name),
            f"{cold.program_s[name]:.1f}",
            f"{warm.program_s[name]:.2f}",
            figure(cold.temp_bytes[name] / 1e6),
        )
        for name in cold.program_s
    ]
    lines += [
        ("all, side by side", f"{cold.elapsed_s:.1f}", f"{warm.elapsed_s:.2f}", ""),
        ("processor time", f"{cold.processor_s:.1f}", f"{warm.processor_s:.2f}", ""),
    ]
    return table(("seconds", "cold", "warm", "temporary MB"), lines)
