"""Start-up: loads and allocates the weights, pool, slots and programs of an engine."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jinfer.compile.compile_cache import use_compilation_cache
from jinfer.compile.names import step_name
from jinfer.compile.program_store import open_store
from jinfer.compile.programs import CompileReport, Compiling
from jinfer.config import EngineConfig, EnginePlan, GenerationDefaults, ModelConfig
from jinfer.hosts.distributed import gather
from jinfer.log import LOGGER, set_up_logging
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
from jinfer.startup.lines import StartLines
from jinfer.startup.memory import check_host_tier, free_bytes_each
from jinfer.startup.plan import resolve_plan
from jinfer.startup.programs import allocate_slots, state_shapes, step_programs
from jinfer.startup.progress import CompileProgress
from jinfer.step.attention import require_served
from jinfer.step.kv_cache import allocate_pages
from jinfer.step.pack import BucketShape
from jinfer.step.page_moves import PAGES_PER_MOVE
from jinfer.weights.dummy import dummy_params
from jinfer.weights.folder import read_hf_config, require_unchanged, states_in
from jinfer.weights.generation_config import read_generation_config
from jinfer.weights.hub import require_no_revision, resolve_model
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
    set_up_logging()
    say = StartLines(shown=config.progress)
    use_compilation_cache(config.compilation_cache)
    folder = _model_folder(config)
    files = states_in(folder)
    model = read_model_config(
        folder, weights=config.load_format != "dummy", overrides=config.hf_overrides
    )
    defaults = read_generation_config(
        folder,
        read_hf_config(folder, config.hf_overrides),
        source=config.generation_config,
        overrides=config.override_generation_config or {},
    )
    tokenizer = _tokenizer_of(config, folder, model)
    # Touch devices last, so that errors in the files show at once.
    platform = platform_of(jax.devices()[0])
    check_host_tier(config, platform)
    placement = Placement(make_mesh(devices or jax.devices(), config.tensor_parallel_size))
    _require_every_process(placement)
    padded = padded_model(model, config.tensor_parallel_size)
    plan = _plan_for(config, model, padded, placement, platform)
    say.plan(config, model, plan)
    _check_weights(config, folder, model)
    state = state_shapes(plan, padded, placement)
    programs = step_programs(plan, model, state, placement)
    pages = slots = runner = None
    store = open_store(placement.devices)
    with (
        CompileProgress(len(programs), shown=config.progress) as progress,
        Compiling(programs, store=store, on_done=progress.done) as compiling,
    ):
        hold = hold_as(plan.weight_layout, placement.sharding)
        start_s = time.perf_counter()
        params, weights = _load_weights(config, model, padded, folder, plan, hold)
        say.weights(weights)
        try:
            if weights is not None:
                require_unchanged(folder, files)
            jax.block_until_ready(params)
            weights_s = time.perf_counter() - start_s
            compiled, made = compiling.result()
            progress.close()
            say.programs(made)
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
                say.host_pages(plan, min_restored_pages)
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


def _model_folder(config: EngineConfig) -> Path:
    return _folder_of(config, config.model, config.revision)


def _tokenizer_folder(config: EngineConfig, folder: Path) -> Path:
    if config.tokenizer is not None:
        return _folder_of(config, config.tokenizer, config.tokenizer_revision)
    if config.tokenizer_revision in (None, config.revision):
        return folder
    return _folder_of(config, config.model, config.tokenizer_revision)


def _folder_of(config: EngineConfig, name: str | Path, revision: str | None) -> Path:
    shipped = find_shipped(name)
    if shipped is not None:
        require_no_revision(shipped, revision)
        return shipped
    return resolve_model(
        name, revision=revision, download_dir=config.download_dir, token=config.hf_token
    )


def _tokenizer_of(config: EngineConfig, folder: Path, model: ModelConfig) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    tokenizer = load_tokenizer(_tokenizer_folder(config, folder))
    if tokenizer.vocab_size > model.vocab_size:
        LOGGER.warning(
            "the tokenizer has %s tokens, the model only %s: text with others is refused",
            f"{tokenizer.vocab_size:,}",
            f"{model.vocab_size:,}",
        )
    return tokenizer


def _check_weights(config: EngineConfig, folder: Path, model: ModelConfig) -> None:
    """Raises for files that cannot be loaded: now, not after minutes of compiling."""
    if config.load_format == "dummy":
        return
    if config.load_format == "safetensors":
        open_checkpoint(folder)  # raises if the folder has no safetensors
    open_checked(folder, model)


def _load_weights(
    config: EngineConfig,
    model: ModelConfig,
    padded: ModelConfig,
    folder: Path,
    plan: EnginePlan,
    hold: Hold,
) -> tuple[Params, LoadReport | None]:
    tree: dict[str, Any] = {"dtype": plan.dtype, "layer_loop": plan.layer_loop, "padded": padded}
    if config.load_format == "dummy":
        return dummy_params(model, **tree, seed=config.seed, hold=hold), None
    return load_params(folder, model, **tree, put=partial(put_held, hold=hold))
