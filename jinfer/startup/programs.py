"""The programs of one engine: the functions to compile, their shapes and their names."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jinfer.compile.compiler_options import compiler_options
from jinfer.compile.names import (
    COPY_PAGES,
    GATHER_PAGES,
    RESTORE_COUNTS,
    SCATTER_PAGES,
    WRITE_SLOTS,
    decode_name,
    step_name,
)
from jinfer.compile.program_key import bound_text
from jinfer.compile.programs import Program
from jinfer.config import EnginePlan, ModelConfig
from jinfer.models.decoder import Decoder, Params
from jinfer.parallel.sharding import Placement
from jinfer.step.attention import ATTENTION
from jinfer.step.decode import run_decode
from jinfer.step.kv_cache import pages_shape
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
from jinfer.weights.layout import hold_as
from jinfer.weights.load import param_shapes


class State(NamedTuple):
    """The arguments of every step, as shapes with shardings."""

    params: Params
    pages: Any
    slots: Any


def state_shapes(plan: EnginePlan, padded: ModelConfig, placement: Placement) -> State:
    """Shapes of the weights, the pool and the slots for a plan."""
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
    """Allocates empty slots, with the shardings of `shapes`."""
    where = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(partial(_empty_slots, plan), out_shardings=where)()


def _empty_slots(plan: EnginePlan) -> SlotState:
    return empty_slots(
        max_slots=plan.max_slots, pages_per_slot=plan.pages_per_slot, vocab_size=plan.vocab_size
    )


def step_programs(
    plan: EnginePlan, model: ModelConfig, state: State, placement: Placement
) -> list[Program]:
    """One program per token bucket and decode bucket, plus those that write slots and move pages.

    Args:
      plan: the engine's plan.
      model: the checkpoint's configuration, without padding.
      state: shapes of the arguments of every step.
      placement: the mesh, for all other arguments.
    """
    bound = dict(
        decoder=Decoder(model, placement.shards),
        paged_attention=ATTENTION[plan.attention],
        max_logprobs=plan.max_logprobs,
        # By default, TPUs and GPUs compute float32 matmuls with fewer bits.
        precision="highest" if plan.dtype == "float32" else "default",
    )
    # The largest compile longest, so they start first.
    steps = {
        step_name(size): (partial(run_step, **bound), BucketShape.of(size, plan))
        for size in reversed(plan.token_buckets)
    }
    decode = partial(run_decode, **bound, max_steps=plan.max_decode_steps)
    decodes = {
        decode_name(size): (decode, DecodeShape.of(size, plan))
        for size in reversed(plan.decode_buckets)
    }
    options = compiler_options(plan.platform, quick=plan.quick_compile)
    made = partial(_program, plan, placement, compiler_options=options)
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


def _program(
    plan: EnginePlan,
    placement: Placement,
    name: str,
    function: Callable[..., Any],
    shapes: tuple[Any, ...],
    *,
    results: Any,
    **settings: Any,
) -> Program:
    # A simulated kernel calls Python, so its program cannot be stored in a file.
    is_simulated = plan.attention.endswith("_interpret")
    bound = None if is_simulated else bound_text(function)
    return Program(
        name=name,
        function=placement.spread(function, shapes, results),
        shapes=shapes,
        made_from=None if bound is None else repr((bound, placement.mesh)),
        **settings,
    )


def _slot_programs(
    made: Callable[..., Program], plan: EnginePlan, slots: SlotState, placement: Placement
) -> list[Program]:
    rows = placement.placed(admission_rows([], plan.vocab_size))
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=placement.sharding(""))
    table_AM = int32((ADMISSION_ROWS, plan.pages_per_slot))
    return [
        made(
            WRITE_SLOTS,
            write_slots,
            (slots, int32((ADMISSION_ROWS,)), rows, table_AM),
            results=slots,
            donate=(0,),
        ),
        made(
            RESTORE_COUNTS,
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
    copy = made(COPY_PAGES, copy_pages, (pages, page_J, page_J), results=pages, donate=(0,))
    if not plan.num_host_pages:
        return [copy]
    # Without its page axis, every array of the pool begins with the axes "LK".
    contents = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement.sharding("LK")),
        jax.eval_shape(gather_pages, pages, page_J),
    )
    return [
        copy,
        made(GATHER_PAGES, gather_pages, (pages, page_J), results=contents, donate=()),
        made(SCATTER_PAGES, scatter_pages, (pages, page_J, contents), results=pages, donate=(0,)),
    ]
