"""Start-up: loads and allocates the weights, pool, slots and programs of an engine."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jinfer.compile.compile_cache import use_compilation_cache
from jinfer.compile.names import step_name
from jinfer.compile.program_store import open_store
from jinfer.compile.programs import CompileReport, Compiling, Program
from jinfer.config import EngineConfig, EnginePlan, GenerationDefaults, ModelConfig
from jinfer.hosts.distributed import gather
from jinfer.models.decoder import Params
from jinfer.parallel.mesh import make_mesh
from jinfer.parallel.model_shards import chip_shard, padded_model
from jinfer.parallel.sharding import Placement
from jinfer.request.tokenizer import Tokenizer, load_tokenizer
from jinfer.runner.model_runner import ModelRunner, free_arrays
from jinfer.runner.page_mover import PageMover
from jinfer.shipped import find_shipped
from jinfer.startup.checks import check_config
from jinfer.startup.defaults import platform_of, resolve_dtype
from jinfer.startup.memory import check_host_tier, free_bytes_each
from jinfer.startup.plan import resolve_plan
from jinfer.startup.programs import allocate_slots, state_shapes, step_programs
from jinfer.step.attention import require_served
from jinfer.step.kv_cache import allocate_pages
from jinfer.step.pack import BucketShape
from jinfer.step.page_moves import PAGES_PER_MOVE
from jinfer.weights.dummy import dummy_params
from jinfer.weights.folder import read_hf_config
from jinfer.weights.generation_config import read_generation_config
from jinfer.weights.hub import resolve_model
from jinfer.weights.layout import Hold, hold_as, put_held
from jinfer.weights.load import (
    LoadReport,
    load_params,
    open_checked,
    read_model_config,
)
from jinfer.weights.safetensors import open_checkpoint

Compiled = dict[str, jax.stages.Compiled]


@dataclass(frozen=True, kw_only=True, slots=True)
class StartReport:
    """Times and counts of start-up."""

    weights_s: float  # reading or making them
    weights: LoadReport | None  # None for random weights
    programs: CompileReport


@dataclass(kw_only=True)
class Loaded:
    """The results of start-up; the engine closes `runner`."""

    model: ModelConfig
    defaults: GenerationDefaults
    tokenizer: Tokenizer | None
    plan: EnginePlan
    runner: ModelRunner
    min_restored_pages: int | None  # recompute fewer than this; None: always recompute
    report: StartReport


def load(config: EngineConfig, devices: Sequence[jax.Device] | None = None) -> Loaded:
    """Decides the plan, reads the weights while the programs compile, and fills the device.

    Args:
      config: the user's arguments.
      devices: the devices of this replica; None = the first of `jax.devices()`.

    Raises:
      CheckpointError: the folder holds no model, or is damaged.
      ValueError: an argument is out of range, or the KV cache does not fit.
      NotImplementedError: the architecture or the platform is not supported.
    """
    check_config(config)
    say = partial(print, "jinfer:", file=sys.stderr, flush=True) if config.progress else _silent
    use_compilation_cache(config.compilation_cache)
    folder = _folder_of(config.model)
    model = read_model_config(folder)
    defaults = read_generation_config(
        folder, read_hf_config(folder), sampling=config.generation_config == "auto"
    )
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = load_tokenizer(_folder_of(config.tokenizer) if config.tokenizer else folder)
    # Touch devices last, so that errors in the files show at once.
    platform = platform_of(jax.devices()[0])
    check_host_tier(config, platform)
    placement = Placement(make_mesh(devices or jax.devices(), config.tensor_parallel_size))
    _require_every_process(placement)
    padded = padded_model(model, config.tensor_parallel_size)
    plan = _plan_for(config, model, padded, placement, platform)
    for line in (*_plan_lines(plan), _capacity_line(plan)):
        say(line)
    if config.load_format != "dummy":
        if config.load_format == "safetensors":
            open_checkpoint(folder)  # raises if the folder has no safetensors
        open_checked(folder, model)  # raises now, not after minutes of compiling
    state = state_shapes(plan, padded, placement)
    programs = step_programs(plan, model, state, placement)
    pages = slots = runner = None
    with _compiling(programs, placement.devices, config.progress) as compiling:
        hold = hold_as(plan.weight_layout, placement.sharding)
        start_s = time.perf_counter()
        params, weights = _load_weights(config, model, padded, folder, plan, hold, say)
        try:
            jax.block_until_ready(params)
            weights_s = time.perf_counter() - start_s
            compiled, made = compiling.result()
            say(made)
            _require_same_plan(gather("plan", repr(plan)))  # also a barrier before collectives
            pages, slots = allocate_pages(state.pages), allocate_slots(plan, state.slots)
            runner = ModelRunner(
                params=params,
                pages=pages,
                slots=slots,
                programs=compiled,
                mover=PageMover(compiled, placement),
            )
            min_restored_pages = None
            if plan.num_host_pages:
                min_restored_pages = break_even_pages(plan, runner)
                say(_host_line(plan, min_restored_pages))
            return Loaded(
                model=model,
                defaults=defaults,
                tokenizer=tokenizer,
                plan=plan,
                runner=runner,
                min_restored_pages=min_restored_pages,
                report=StartReport(weights_s=weights_s, weights=weights, programs=made),
            )
        except BaseException:
            # A notebook keeps the traceback, which keeps these arrays alive.
            free_arrays(params, pages, slots)
            if runner is not None:
                runner.close()
            raise


def break_even_pages(plan: EnginePlan, runner: ModelRunner) -> int | None:
    """Measures both ways to get a page: compute its tokens, or fetch it from the host.

    Computing is timed with the largest step, all padding: its matrix products take as long.
    Fetching is timed with a dispatch of `PAGES_PER_MOVE` pages. Fewer pages count as taking just
    as long, so a few pages are fetched only if that is surely faster.

    Returns:
      The fewest pages worth one dispatch; None if fetching `PAGES_PER_MOVE` pages takes longer
      than computing them.
    """
    size = plan.max_step_tokens
    batch = BucketShape.of(size, plan).empty()
    step_s = math.inf
    for _ in range(3):
        start_s = time.perf_counter()
        jax.block_until_ready(runner.run(step_name(size), batch))
        step_s = min(step_s, time.perf_counter() - start_s)
    num_pages = math.ceil(runner.time_restore() / (step_s / size * plan.page_size))
    return num_pages if num_pages <= PAGES_PER_MOVE else None


def _require_every_process(placement: Placement) -> None:
    used = {device.process_index for device in placement.devices}
    idle = sorted(set(range(jax.process_count())) - used)
    if idle:
        raise ValueError(
            "every process needs a device of the model; got tensor_parallel_size="
            f"{placement.mesh.size}, which leaves none to processes {idle}. Raise it to the "
            f"{jax.device_count()} devices of all processes, or start fewer."
        )


def _require_same_plan(plans: Sequence[str]) -> None:
    for process_id, plan in enumerate(plans):
        if plan != plans[0]:
            raise ValueError(
                f"every process must come to the same plan; got {plan} in process {process_id} and "
                f"{plans[0]} in process 0. Run the same version on hosts of one kind."
            )


def _room_beside_weights(
    config: EngineConfig, padded: ModelConfig, platform: str, free_bytes: int
) -> int:
    """Bytes left on each device after its shard of the weights."""
    dtype = resolve_dtype(config, platform)
    shard = chip_shard(padded, config.tensor_parallel_size)
    weight_bytes = shard.num_parameters * jnp.dtype(dtype).itemsize
    if weight_bytes > free_bytes:
        each = "" if config.tensor_parallel_size == 1 else " on each device"
        raise ValueError(
            f"the weights must fit into free memory; got {weight_bytes / 2**30:,.3f} GiB of "
            f"{dtype} with {free_bytes / 2**30:,.3f} GiB free{each}. Choose a smaller model, free "
            "the device, or raise tensor_parallel_size."
        )
    return free_bytes - weight_bytes


def _plan_for(
    config: EngineConfig,
    model: ModelConfig,
    padded: ModelConfig,
    placement: Placement,
    platform: str,
) -> EnginePlan:
    """The plan that fits the devices; raises if the attention does not support it."""
    # Processes measure different amounts, but all need the same plan: take the least.
    free_bytes = min(map(int, gather("free bytes", str(free_bytes_each(placement.local_devices)))))
    plan = resolve_plan(
        config,
        model,
        platform=platform,
        free_bytes=_room_beside_weights(config, padded, platform, free_bytes),
        device_kind=placement.devices[0].device_kind,
    )
    require_served(plan, chip_shard(padded, plan.tensor_parallel_size))
    return plan


def _folder_of(name: str | Path) -> Path:
    return find_shipped(name) or resolve_model(name)


def _load_weights(
    config: EngineConfig,
    model: ModelConfig,
    padded: ModelConfig,
    folder: Path,
    plan: EnginePlan,
    hold: Hold,
    say: Any,
) -> tuple[Params, LoadReport | None]:
    tree: dict[str, Any] = {"dtype": plan.dtype, "layer_loop": plan.layer_loop, "padded": padded}
    if config.load_format == "dummy":
        params = dummy_params(model, **tree, seed=config.seed, hold=hold)
        say(f"made {model.num_parameters:,} random parameters, {plan.dtype}")
        return params, None
    params, report = load_params(folder, model, **tree, put=partial(put_held, hold=hold))
    say(report)
    return params, report


def _plan_lines(plan: EnginePlan) -> tuple[str, str]:
    sizes = ", ".join(map(str, plan.token_buckets))
    rows = ", ".join(map(str, plan.decode_buckets))
    decodes = f", decodes of {rows} rows, up to {plan.max_decode_steps} at once" if rows else ""
    return (
        f"{plan.platform}, {plan.dtype}, {plan.attention} attention, {plan.layer_loop} layers, "
        f"{plan.weight_layout} weights, {plan.max_slots} slots",
        f"steps of {sizes} tokens{decodes}",
    )


def _capacity_line(plan: EnginePlan) -> str:
    pool_gib = plan.num_pages * plan.page_bytes / 2**30
    num_longest = plan.kv_capacity / plan.max_model_len
    return (
        f"KV cache {pool_gib:.2f} GiB of {plan.kv_dtype}: {plan.kv_capacity:,} tokens in "
        f"{plan.num_pages - 1:,} pages of {plan.page_size}, {num_longest:.1f} x max_model_len"
    )


def _host_line(plan: EnginePlan, min_restored_pages: int | None) -> str:
    host_gib = plan.num_host_pages * plan.page_bytes / 2**30
    if min_restored_pages is None:
        return "host memory keeps no KV pages: to fetch them takes longer than to compute them"
    return (
        f"host memory keeps {plan.num_host_pages:,} more pages, {host_gib:.2f} GiB, "
        f"fetched from {min_restored_pages} on"
    )


@contextmanager
def _compiling(
    programs: Sequence[Program], devices: Sequence[jax.Device], progress: bool
) -> Iterator[Compiling]:
    store = open_store(devices)
    # For tqdm, None means: a bar on a terminal, nothing in a file or a pipe.
    disable = None if progress else True
    with (
        tqdm(total=len(programs), desc="compiling", disable=disable, leave=False) as bar,
        Compiling(programs, store=store, on_done=lambda name: bar.update()) as compiling,
    ):
        yield compiling


def _silent(*_: Any) -> None:
    pass
