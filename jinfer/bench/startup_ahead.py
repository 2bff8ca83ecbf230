"""What compiling an engine's programs takes for a chip that is not here: cold, and warm."""

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
from jinfer.bench.table import figure, table
from jinfer.compile.program_store import ProgramStore, open_store
from jinfer.compile.programs import Program
from jinfer.config import EngineConfig, EnginePlan
from jinfer.parallel.mesh import make_mesh
from jinfer.parallel.model_shards import padded_model
from jinfer.parallel.sharding import Placement
from jinfer.startup.load import state_shapes, step_programs
from jinfer.startup.resolve import check_config, resolve_dtype, resolve_plan
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

    elapsed_s: float  # of all together
    processor_s: float  # the same, counted on the processors; other work does not disturb it
    program_s: Mapping[str, float]  # of each program, while others are on their way
    temp_bytes: Mapping[str, int]  # memory beside the arguments; of those that were compiled


def measure_ahead(
    target: str, config: EngineConfig, folder: Path, say: Callable[[str], object]
) -> tuple[EnginePlan, dict[str, Ahead]]:
    """Compiles every program of an engine with nothing kept, then finds each in the store.

    Warm is everything but the last: a program that was found is read, checked and unpacked, but
    cannot be loaded without its chip.

    Args:
      target: a chip's name; `config` is for one of them.
      config: what the user asks of the engine.
      folder: of a model; its weights are not read.
      say: told of each program that is done.

    Raises:
      ValueError: there is no such chip or no compiler for it, or the plan has no room.
    """
    check_config(config)
    device, share = describe(target)
    chip, model = chip_named(target), read_model_config(folder)
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
                "startup --target needs the sources of jinfer, as they were when they were "
                "imported; got none, or others. Run it again."
            )
        into = partial(get, store=store)
        return plan, {name: _get_all(programs, into) for name in ("cold", "warm")}


def _get_all(
    programs: Sequence[Program], get: Callable[[Program], tuple[float, int | None]]
) -> Ahead:
    jax.clear_caches()  # of what was traced before
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
    """Compiles; None if there was no need, since the store has the program."""
    described = program.description  # None of a simulated kernel's, which is never stored
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
            name,
            f"{cold.program_s[name]:.1f}",
            f"{warm.program_s[name]:.2f}",
            figure(cold.temp_bytes[name] / 1e6),
        )
        for name in cold.program_s
    ]
    lines += [
        ("all together", f"{cold.elapsed_s:.1f}", f"{warm.elapsed_s:.2f}", ""),
        ("on the processors", f"{cold.processor_s:.1f}", f"{warm.processor_s:.2f}", ""),
    ]
    return table(("seconds", "cold", "warm", "temporary MB"), lines)
