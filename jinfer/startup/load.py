"""From an EngineConfig to everything an engine needs: weights, pool, slots, programs."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jinfer.compile.compile_cache import use_compilation_cache
from jinfer.compile.compiler_options import compiler_options
from jinfer.compile.program_store import open_store
from jinfer.compile.programs import CompileReport, Compiling, Program
from jinfer.config import EngineConfig, EnginePlan, GenerationDefaults, ModelConfig
from jinfer.hosts.distributed import gather
from jinfer.models.decoder import Decoder, Params
from jinfer.parallel.mesh import make_mesh
from jinfer.parallel.model_shards import chip_shard, padded_model
from jinfer.parallel.sharding import Placement
from jinfer.request.tokenizer import Tokenizer, load_tokenizer
from jinfer.runner.model_runner import ModelRunner, free_arrays
from jinfer.runner.page_mover import PageMover
from jinfer.shipped import find_shipped
from jinfer.startup.resolve import (
    check_config,
    check_host_tier,
    free_bytes_each,
    platform_of,
    resolve_dtype,
    resolve_plan,
)
from jinfer.step.attention import ATTENTION, require_served
from jinfer.step.decode import run_decode
from jinfer.step.kv_cache import allocate_pages, pages_shape
from jinfer.step.pack import BucketShape, DecodeShape
from jinfer.step.page_moves import PAGES_PER_MOVE, copy_pages, gather_pages, scatter_pages
from jinfer.step.slots import (
    ADMISSION_ROWS,
    RESTORED_TOKENS,
    SlotState,
    admission_rows,
    empty_slots,
    restore_counts,
    write_slots,
)
from jinfer.step.step import run_step
from jinfer.weights.dummy import dummy_params
from jinfer.weights.folder import read_hf_config
from jinfer.weights.generation_config import read_generation_config
from jinfer.weights.hub import resolve_model
from jinfer.weights.layout import Hold, hold_as, put_held
from jinfer.weights.load import (
    LoadReport,
    load_params,
    open_checked,
    param_shapes,
    read_model_config,
)
from jinfer.weights.safetensors import open_checkpoint

Compiled = dict[str, jax.stages.Compiled]


@dataclass(frozen=True, kw_only=True, slots=True)
class StartReport:
    """What start-up did, in figures."""

    weights_s: float  # reading or making them
    weights: LoadReport | None  # None of random ones
    programs: CompileReport


@dataclass(kw_only=True)
class Loaded:
    """What start-up made; `runner` is the engine's to close."""

    model: ModelConfig
    defaults: GenerationDefaults
    tokenizer: Tokenizer | None
    plan: EnginePlan
    runner: ModelRunner
    min_restored_pages: int | None  # fewer are computed sooner than fetched; None: always sooner
    report: StartReport


def load(config: EngineConfig, devices: Sequence[jax.Device] | None = None) -> Loaded:
    """Decides the plan, then reads the weights while every program compiles, and fills the device.

    Args:
      config: what the user asks.
      devices: those of this replica; None = the first of all.

    Raises:
      CheckpointError: the folder is not a model's, or is damaged.
      ValueError: an argument is out of range, or the KV cache has no room.
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
    # Devices are touched last: what the files show to be wrong is told at once.
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
            open_checkpoint(folder)  # refuses a folder of another kind
        open_checked(folder, model)  # refused now, not after minutes of compiling
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
            _require_same_plan(gather("plan", repr(plan)))  # and all are here, for collectives
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
            # A notebook keeps the traceback, and that what it can see.
            free_arrays(params, pages, slots)
            if runner is not None:
                runner.close()
            raise


def break_even_pages(plan: EnginePlan, runner: ModelRunner) -> int | None:
    """Measures both ways to get a page: computing its tokens, and fetching it from the host.

    Computing is timed as the largest step, of padding only: its matrix products do not care.
    Fetching is timed as one dispatch of as many pages as it moves at most, and taken to cost as
    much for fewer, so a few pages are fetched only where that surely wins.

    Returns:
      The fewest pages worth one dispatch; None if even a full one takes longer than computing as
      many pages.
    """
    size = plan.max_step_tokens
    batch = BucketShape.of(size, plan).empty()
    step_s = math.inf
    for _ in range(3):
        start_s = time.perf_counter()
        jax.block_until_ready(runner.run(f"step of {size} tokens", batch))
        step_s = min(step_s, time.perf_counter() - start_s)
    num_pages = math.ceil(runner.time_restore() / (step_s / size * plan.page_size))
    return num_pages if num_pages <= PAGES_PER_MOVE else None


class State(NamedTuple):
    """What every step takes, as shapes with their places."""

    params: Params
    pages: Any
    slots: Any


def state_shapes(plan: EnginePlan, padded: ModelConfig, placement: Placement) -> State:
    """The weights, the pool and the slots that the plan asks for."""
    hold = hold_as(plan.weight_layout, placement.sharding)
    params = param_shapes(padded, dtype=plan.dtype, layer_loop=plan.layer_loop, hold=hold)
    pages = pages_shape(
        padded,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        dtype=plan.kv_dtype,
        head_dim=plan.kv_head_dim,
        sharding=placement.sharding("LPK"),
    )
    slots = placement.placed(jax.eval_shape(partial(_empty_slots, plan)))
    return State(params, pages, slots)


def allocate_slots(plan: EnginePlan, shapes: Any) -> SlotState:
    """Slots in which nothing runs, where the shapes say."""
    where = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(partial(_empty_slots, plan), out_shardings=where)()


def _empty_slots(plan: EnginePlan) -> SlotState:
    return empty_slots(
        max_slots=plan.max_slots, pages_per_slot=plan.pages_per_slot, vocab_size=plan.vocab_size
    )


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
    """What each device has left; weights are cut over them evenly."""
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
    """What the devices have room for; refused where the attention does not serve it."""
    # What is measured here may be more elsewhere, or less; the plan has to be the same.
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
    tree: dict[str, Any] = {"dtype": plan.dtype, "layer_loop": plan.layer_loop, "held": padded}
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


def step_programs(
    plan: EnginePlan, model: ModelConfig, state: State, placement: Placement
) -> list[Program]:
    """One program per token and per row bucket, the writers of slots, moves of pages.

    Args:
      plan: what was decided.
      model: as the checkpoint has it.
      state: shapes of what every step takes.
      placement: of whatever else a program takes.
    """
    options = dict(
        decoder=Decoder(model, placement.shards),
        paged_attention=ATTENTION[plan.attention],
        max_logprobs=plan.max_logprobs,
        # On TPU and GPU a float32 matmul is computed in fewer bits unless told otherwise.
        precision="highest" if plan.dtype == "float32" else "default",
    )
    # The largest take longest to compile, so they go first.
    steps = {
        f"step of {size} tokens": (partial(run_step, **options), BucketShape.of(size, plan))
        for size in reversed(plan.token_buckets)
    }
    decode = partial(run_decode, **options, max_steps=plan.max_decode_steps)
    decodes = {
        f"decode of {size} rows": (decode, DecodeShape.of(size, plan))
        for size in reversed(plan.decode_buckets)
    }
    made = partial(
        _program,
        placement,
        made_from=_made_from(plan, model, placement),
        compiler_options=compiler_options(plan.platform),
    )
    return [
        *[
            made(
                name,
                function,
                (*state, placement.placed(bucket.shapes())),
                results=(state.pages, state.slots, None),
                donate=(1, 2),
            )
            for name, (function, bucket) in (steps | decodes).items()
        ],
        *_slot_programs(made, plan, state.slots, placement),
        *_move_programs(made, plan, state.pages, placement),
    ]


def _made_from(plan: EnginePlan, model: ModelConfig, placement: Placement) -> str | None:
    if plan.attention.endswith("_interpret"):
        return None  # a simulated kernel calls Python, which no file can keep
    return repr((plan, model, placement.mesh))


def _program(
    placement: Placement,
    name: str,
    function: Callable[..., Any],
    shapes: tuple[Any, ...],
    *,
    results: Any,
    **settings: Any,
) -> Program:
    spread = placement.spread(function, shapes, results)
    return Program(name=name, function=spread, shapes=shapes, **settings)


def _slot_programs(
    made: Callable[..., Program], plan: EnginePlan, slots: SlotState, placement: Placement
) -> list[Program]:
    rows = placement.placed(admission_rows([], plan.vocab_size))
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=placement.sharding(""))
    table_AM = int32((ADMISSION_ROWS, plan.pages_per_slot))
    return [
        made(
            "write_slots",
            write_slots,
            (slots, int32((ADMISSION_ROWS,)), rows, table_AM),
            results=slots,
            donate=(0,),
        ),
        made(
            "restore_counts",
            partial(restore_counts, shards=placement.shards),
            (slots, int32(()), int32((RESTORED_TOKENS,))),
            results=slots,
            donate=(0,),
        ),
    ]


def _move_programs(
    made: Callable[..., Program], plan: EnginePlan, pages: Any, placement: Placement
) -> list[Program]:
    page_J: Any = jax.ShapeDtypeStruct(
        (PAGES_PER_MOVE,), jnp.int32, sharding=placement.sharding("")
    )
    copy = made("copy_pages", copy_pages, (pages, page_J, page_J), results=pages, donate=(0,))
    if not plan.num_host_pages:
        return [copy]
    # A page without the axis of pages begins with "LK", whichever part of the pool it is of.
    contents = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement.sharding("LK")),
        jax.eval_shape(gather_pages, pages, page_J),
    )
    return [
        copy,
        made("gather_pages", gather_pages, (pages, page_J), results=contents, donate=()),
        made("scatter_pages", scatter_pages, (pages, page_J, contents), results=pages, donate=(0,)),
    ]


@contextmanager
def _compiling(
    programs: Sequence[Program], devices: Sequence[jax.Device], progress: bool
) -> Iterator[Compiling]:
    store = open_store(devices)
    # None: a bar on a terminal, nothing in a file or a pipe.
    disable = None if progress else True
    with (
        tqdm(total=len(programs), desc="compiling", disable=disable, leave=False) as bar,
        Compiling(programs, store=store, on_done=lambda name: bar.update()) as compiling,
    ):
        yield compiling


def _silent(*_: Any) -> None:
    pass
