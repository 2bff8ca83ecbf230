"""From an EngineConfig to everything an engine needs: weights, pool, slots, programs."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from jinfer.config import EngineConfig, EnginePlan, GenerationDefaults, ModelConfig
from jinfer.models.decoder import Decoder, Params
from jinfer.request.tokenizer import Tokenizer, load_tokenizer
from jinfer.resolve import (
    check_config,
    free_device_bytes,
    platform_of,
    resolve_dtype,
    resolve_plan,
)
from jinfer.shipped import find_shipped
from jinfer.step.attention import ATTENTION, require_served
from jinfer.step.compile_cache import use_compilation_cache
from jinfer.step.decode import run_decode
from jinfer.step.kv_cache import KVPages, allocate_pages, pages_shape
from jinfer.step.pack import BucketShape, DecodeShape
from jinfer.step.programs import Program, compile_all
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
from jinfer.weights.layout import hold_as, put_held
from jinfer.weights.load import load_params, read_model_config

Compiled = dict[str, jax.stages.Compiled]


@dataclass(kw_only=True)
class Loaded:
    """What start-up made. The engine takes `pages` and `slots` and replaces them every step."""

    model: ModelConfig
    defaults: GenerationDefaults
    tokenizer: Tokenizer | None
    plan: EnginePlan
    params: Params
    pages: KVPages
    slots: SlotState
    programs: Compiled


def load(config: EngineConfig) -> Loaded:
    """Reads the checkpoint, decides the plan, compiles every program and fills the device.

    Raises:
      CheckpointError: the folder is not a model's, or is damaged.
      ValueError: an argument is out of range, or the KV cache has no room.
      NotImplementedError: the architecture or the platform is not supported.
    """
    check_config(config)
    say = partial(print, "jinfer:", file=sys.stderr, flush=True) if config.progress else _silent
    use_compilation_cache(config.compilation_cache)
    device = jax.devices()[0]
    platform = platform_of(device)
    folder = _folder_of(config.model)
    model = read_model_config(folder)
    defaults = read_generation_config(folder, read_hf_config(folder))
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = load_tokenizer(_folder_of(config.tokenizer) if config.tokenizer else folder)
    decide = partial(resolve_plan, config, model, platform=platform, device_kind=device.device_kind)
    # What cannot be is refused now, not after minutes of reading weights.
    plan = decide(
        free_bytes=_room_beside_weights(config, model, platform, free_device_bytes(device))
    )
    require_served(plan, model, pool_shape(plan, model))
    params = _load_weights(config, plan, model, folder, say)
    try:
        plan = decide(free_bytes=free_device_bytes(device))
        say(_plan_line(plan))
        say(_capacity_line(plan))
        make_slots = partial(
            empty_slots,
            max_slots=plan.max_slots,
            pages_per_slot=plan.pages_per_slot,
            vocab_size=model.vocab_size,
        )
        shape = pool_shape(plan, model)
        slots = jax.eval_shape(make_slots)
        programs = _compile(plan, model, params, shape, slots, config.progress, say)
        return Loaded(
            model=model,
            defaults=defaults,
            tokenizer=tokenizer,
            plan=plan,
            params=params,
            pages=allocate_pages(shape),
            slots=make_slots(),
            programs=programs,
        )
    except BaseException:
        free_arrays(params)  # a notebook keeps the traceback, and that the weights
        raise


def pool_shape(plan: EnginePlan, model: ModelConfig) -> Any:
    """The pool of KV pages that the plan asks for, as shapes."""
    return pages_shape(
        model,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        dtype=plan.kv_dtype,
        head_width=plan.kv_head_width,
    )


def free_arrays(*trees: Any) -> None:
    """Frees the device memory of every array, whoever else may still refer to it."""
    for array in jax.tree.leaves(trees):
        if isinstance(array, jax.Array) and not array.is_deleted():
            array.delete()


def _room_beside_weights(
    config: EngineConfig, model: ModelConfig, platform: str, free_bytes: int
) -> int:
    dtype = resolve_dtype(config, platform)
    weight_bytes = model.num_parameters * jnp.dtype(dtype).itemsize
    if weight_bytes > free_bytes:
        raise ValueError(
            f"the weights must fit into free memory; got {weight_bytes / 2**30:,.3f} GiB of "
            f"{dtype} with {free_bytes / 2**30:,.3f} GiB free. Choose a smaller model, or free "
            "the device."
        )
    return free_bytes - weight_bytes


def _folder_of(name: str | Path) -> Path:
    return find_shipped(name) or resolve_model(name)


def _load_weights(
    config: EngineConfig, plan: EnginePlan, model: ModelConfig, folder: Path, say: Any
) -> Params:
    hold = hold_as(plan.weight_layout, SingleDeviceSharding(jax.devices()[0]))
    tree = {"dtype": plan.dtype, "layer_loop": plan.layer_loop}
    if config.load_format == "dummy":
        params = dummy_params(model, **tree, seed=config.seed, hold=hold)
        say(f"made {model.num_parameters:,} random parameters, {plan.dtype}")
        return params
    params, report = load_params(folder, model, **tree, put=partial(put_held, hold=hold))
    say(report)
    return params


def _plan_line(plan: EnginePlan) -> str:
    sizes = ", ".join(map(str, plan.token_buckets))
    return (
        f"{plan.platform}, {plan.dtype}, {plan.attention} attention, {plan.layer_loop} layers, "
        f"{plan.weight_layout} weights; "
        f"{plan.max_slots} slots, steps of {sizes} tokens, up to {plan.max_decode_steps} at once"
    )


def _capacity_line(plan: EnginePlan) -> str:
    pool_gib = plan.num_pages * plan.page_bytes / 2**30
    concurrency = min(plan.max_slots, plan.kv_capacity / plan.max_model_len)
    return (
        f"KV cache {pool_gib:.2f} GiB of {plan.kv_dtype}: {plan.kv_capacity:,} tokens in "
        f"{plan.num_pages - 1:,} pages of {plan.page_size}; {concurrency:.1f} sequences of "
        f"{plan.max_model_len:,} tokens at once"
    )


def step_programs(
    plan: EnginePlan, model: ModelConfig, params: Params, pages: Any, slots: SlotState
) -> list[Program]:
    """One step per token bucket, several per row bucket, and the two writers of slots."""
    options = dict(
        decoder=Decoder(model),
        paged_attention=ATTENTION[plan.attention],
        max_logprobs=plan.max_logprobs,
        # On TPU and GPU a float32 matmul is computed in fewer bits unless told otherwise.
        precision="highest" if plan.dtype == "float32" else "default",
    )
    shapes = partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))
    state = (jax.tree.map(partial(_weight_shape, plan), params), pages, shapes(slots))
    vocab_size = model.vocab_size
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    steps = [
        Program(
            name=f"step of {size} tokens",
            function=partial(run_step, **options),
            shapes=(*state, BucketShape.of(size, plan).shapes()),
            donate=(1, 2),
        )
        # The largest take longest to compile, so they go first.
        for size in reversed(plan.token_buckets)
    ]
    decode = partial(run_decode, **options, max_steps=plan.max_decode_steps)
    decodes = [
        Program(
            name=f"decode of {size} rows",
            function=decode,
            shapes=(*state, DecodeShape.of(size, plan).shapes()),
            donate=(1, 2),
        )
        for size in reversed(plan.decode_buckets)
    ]
    rows = shapes(admission_rows([], vocab_size))
    return [
        *steps,
        *decodes,
        Program(
            name="write_slots",
            function=write_slots,
            shapes=(
                shapes(slots),
                int32((ADMISSION_ROWS,)),
                rows,
                int32((ADMISSION_ROWS, plan.pages_per_slot)),
            ),
            donate=(0,),
        ),
        Program(
            name="restore_counts",
            function=restore_counts,
            shapes=(shapes(slots), int32(()), int32((RESTORED_TOKENS,))),
            donate=(0,),
        ),
    ]


def _weight_shape(plan: EnginePlan, weight: Any) -> jax.ShapeDtypeStruct:
    """With the format that a weight is held in, unless that is what a program takes anyway."""
    held = None if plan.weight_layout == "default" else weight.format
    return jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=held)


def _compile(
    plan: EnginePlan,
    model: ModelConfig,
    params: Params,
    pages: Any,
    slots: SlotState,
    progress: bool,
    say: Any,
) -> Compiled:
    programs = step_programs(plan, model, params, pages, slots)
    # None: a bar on a terminal, nothing in a file or a pipe.
    disable = None if progress else True
    with tqdm(total=len(programs), desc="compiling", disable=disable, leave=False) as bar:
        compiled, report = compile_all(programs, on_done=lambda name: bar.update())
    say(f"{report.num_programs} programs ready in {report.elapsed_s:.1f} s")
    return compiled


def _silent(*_: Any) -> None:
    pass
