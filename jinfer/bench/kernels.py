"""`jinfer bench kernels`: paged attention at serving shapes, against the device's ceilings."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jinfer.bench.baselines import BASELINES, variants_of
from jinfer.bench.ceilings import Ceilings, precision_of
from jinfer.bench.chips import memory_of
from jinfer.bench.kernel_cases import Work, work_of
from jinfer.bench.kernel_check import BOUNDS, Step, max_error
from jinfer.bench.table import figure, percent, table
from jinfer.bench.timing import Timing, time_loop
from jinfer.startup.defaults import default_page_size
from jinfer.step.attention import ATTENTION
from kernels_pallas.paged_attention.cases import Case
from kernels_pallas.paged_attention.pages import LARGEST, Pages, QuantizedPages

# Default implementations to time: all that run on the platform, without simulations.
IMPLEMENTATIONS = {"cpu": ("xla",), "gpu": ("gpu", "xla_wide"), "tpu": ("tpu", "xla_wide")}
# Calls cycle through the layers of a pool of this size, so that no cache holds the next layer.
_POOL_BYTES, _MOST_LAYERS = 1 << 28, 32
_HEADROOM = 1.25  # memory needed, as a factor on the pool
# On GPUs, XLA asks the host after each iteration of a loop of data-dependent length, some 20 us. So
# each iteration ("turn") is a loop of fixed length: calls that move this many bytes together, at
# most _MOST_IN_TURN.
_TURN_BYTES, _MOST_IN_TURN = 5e9, 16

Shaped = Callable[[tuple[int, ...], Any], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """The arguments of a call: arrays to run it, or shapes to compile it."""

    q_TNH: Any
    k_TKH: Any
    pages: Any
    table_BM: Any
    rows: tuple[Any, Any, Any]  # kv_len_B, query_start_B, query_len_B


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of one case with one implementation, or the reason why there is none."""

    case: str
    implementation: str
    work: Work
    error: float | None = None  # the largest, as a fraction of the largest output
    error_bound: float | None = None
    timing: Timing | None = None
    temp_bytes: int | None = None  # beside the pool, by the compiler's count
    why_not: str | None = None

    def as_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """All measurements, and their fractions of the ceilings."""
        said: dict[str, Any] = asdict(self)
        if self.timing is not None:
            said["bandwidth_share"] = self.bandwidth_share(ceilings)
            said["flops_share"] = self.flops_share(ceilings)
        return said

    @property
    def is_wrong(self) -> bool:
        """Whether it was checked and its error exceeds the bound, or is NaN."""
        if self.error is None or self.error_bound is None:
            return False
        return not self.error <= self.error_bound

    def bandwidth_share(self, ceilings: Ceilings) -> float:
        """Necessary bytes per second, over the rate of a large copy or read."""
        assert self.timing is not None, self
        return self.work.num_bytes / self.timing.median_s / ceilings.bytes_per_s

    def flops_share(self, ceilings: Ceilings) -> float:
        """Necessary flops per second, over the rate of a large matrix product."""
        assert self.timing is not None, self
        return self.work.num_flops / self.timing.median_s / ceilings.flops_per_s


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is no implementation's."""
    for name in names:
        if name not in ATTENTION and name not in BASELINES:
            listed = ", ".join((*ATTENTION, *BASELINES))
            raise ValueError(
                f"--implementation must be one of {listed}; got {name!r}. Choose one of these."
            )


def arguments(case: Case, dtype: str, page_size: int, num_layers: int, shaped: Shaped) -> Arguments:
    """A case's arguments, each made by `shaped(shape, dtype)`."""
    num_rows, num_tokens = len(case.kv_len), sum(case.query_len)
    num_pages = 1 + sum(-(-kv_len // page_size) for kv_len in case.kv_len)
    table_width = -(-max(case.kv_len) // page_size)
    per_head = (num_layers, num_pages, case.num_kv_heads)
    pages = shaped((*per_head, page_size, 2 * case.head_dim), case.pages_dtype or dtype)
    if case.pages_dtype is not None:
        pages = QuantizedPages(pages, shaped((*per_head, 2, page_size), "float32"))
    per_row = shaped((num_rows,), "int32")
    return Arguments(
        q_TNH=shaped((num_tokens, case.num_q_heads, case.head_dim), dtype),
        k_TKH=shaped((num_tokens, case.num_kv_heads, case.head_dim), dtype),
        pages=pages,
        table_BM=shaped((num_rows, table_width), "int32"),
        rows=(per_row, per_row, per_row),
    )


def page_size_of(case: Case, platform: str, dtype: str) -> int:
    """The engine's default number of tokens per page on a platform."""
    return default_page_size(platform, case.pages_dtype or dtype)


def time_case(
    case: Case, name: str, *, dtype: str, page_size: int, free_bytes: int, num_loops: int
) -> Result:
    """Times one implementation on one case; declining it, or a lack of room, is a result too."""
    work = work_of(case, dtype)
    result = Result(case=case.name, implementation=name, work=work)
    needed = work.pool_bytes * _HEADROOM
    if needed > free_bytes:
        why = f"no room: {needed / 2**30:.1f} GiB needed, {free_bytes / 2**30:.1f} GiB free"
        return replace(result, why_not=why)
    num_layers = int(min(max(1, _POOL_BYTES // work.pool_bytes), _MOST_LAYERS))
    if name in BASELINES:
        num_layers = min(num_layers, BASELINES[name].most_layers or num_layers)
    turn = _calls_in_turn(work, jax.default_backend())
    timings = []
    try:
        with jax.default_matmul_precision(precision_of(dtype)):
            error = _error(case, name, dtype, page_size)
            result = replace(result, error=error, error_bound=BOUNDS[dtype])
            for attend in variants_of(name):
                loop = _compiled_loop(case, name, attend, dtype, page_size, num_layers, turn)
                timings.append((time_loop(loop[0], num_loops=num_loops).of_each(turn), loop[1]))
                del loop  # and the pool with it
    # The implementation declined, or the compiler or the device failed: other cases go on.
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        if not timings:
            return replace(result, why_not=one_line(error))
    timing, temp_bytes = min(timings, key=lambda pair: pair[0].median_s)
    return replace(result, timing=timing, temp_bytes=temp_bytes)


def pages_for(name: str, pages: Any, shaped: Shaped) -> Any:
    """The shapes of the pool in the form that the named implementation takes."""
    if name not in BASELINES:
        return pages
    parts = jax.eval_shape(BASELINES[name].split, pages)
    return jax.tree.map(lambda part: shaped(part.shape, part.dtype), parts)


def _error(case: Case, name: str, dtype: str, page_size: int) -> float:
    shapes = arguments(case, dtype, page_size, 1, jax.ShapeDtypeStruct)
    kv_len_B, start_B, query_len_B = _rows(case)
    step = Step(
        q_TNH=_filled(shapes.q_TNH, 0),
        new_TKH=_filled(shapes.k_TKH, 1),
        table_BM=_page_table(case, page_size),
        kv_len_B=kv_len_B,
        start_B=start_B,
        query_len_B=query_len_B,
    )
    split = BASELINES[name].split if name in BASELINES else None
    return max_error(variants_of(name)[0], case, step, lambda: _pool(shapes.pages), split)


def one_line(error: Exception) -> str:
    """The first line of an error, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def _calls_in_turn(work: Work, platform: str) -> int:
    if platform == "cpu":
        return 1
    return max(1, min(_MOST_IN_TURN, int(_TURN_BYTES // work.num_bytes)))


def _compiled_loop(
    case: Case,
    name: str,
    attend: Callable[..., tuple[Any, Any]],
    dtype: str,
    page_size: int,
    num_layers: int,
    turn: int,
) -> tuple[Callable[[int], None], int]:
    shapes = arguments(case, dtype, page_size, num_layers, jax.ShapeDtypeStruct)
    shapes = replace(shapes, pages=pages_for(name, shapes.pages, jax.ShapeDtypeStruct))
    attend = partial(attend, scale=case.head_dim**-0.5)

    def loop(q_TNH, pages, num_turns, k_TKH, table_BM, rows):
        def one(i, carry):
            q_TNH, pages = carry
            # As in a decoder, new keys and values depend on the last call's output. Halved, because
            # the output of a prompt's first token is its own value, and would grow with each call.
            new_TKH = k_TKH + q_TNH[:, : case.num_kv_heads] * 0.5
            return attend(q_TNH, new_TKH, new_TKH, pages, i % num_layers, table_BM, *rows)

        def one_turn(i, carry):
            return lax.fori_loop(0, turn, lambda j, carry: one(i * turn + j, carry), carry)

        return lax.fori_loop(0, num_turns, one_turn if turn > 1 else one, (q_TNH, pages))

    jitted = jax.jit(loop, donate_argnums=(0, 1))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jitted.lower(
        shapes.q_TNH, shapes.pages, count, shapes.k_TKH, shapes.table_BM, shapes.rows
    ).compile()
    state, k_TKH = (_filled(shapes.q_TNH, 0), _pool(shapes.pages)), _filled(shapes.k_TKH, 1)
    fixed = (k_TKH, jnp.asarray(_page_table(case, page_size)), tuple(map(jnp.asarray, _rows(case))))

    def run(num_turns: int) -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(*state, jnp.int32(num_turns), *fixed))

    return run, memory_of(compiled).temp_size_in_bytes


def _filled(shape: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    """Numbers between -1 and 1, without a pattern that could speed up hardware or a softmax."""
    size = shape.size

    def fill() -> jax.Array:
        # The finalizer of MurmurHash3: it scatters neighbours, and it fuses, while a random
        # generator would keep its bits in memory. It relies on the wrap-around of uint32.
        place = lax.iota(jnp.uint32, size) + jnp.uint32(seed * 0x9E3779B9 % 2**32)
        for factor, shift in ((1, 16), (0x85EBCA6B, 13), (0xC2B2AE35, 16)):
            place *= jnp.uint32(factor)
            place ^= place >> shift
        unit = (place >> 8).astype(jnp.float32) * 2.0**-23 - 1
        numbers = unit * 127 if jnp.issubdtype(shape.dtype, jnp.integer) else unit
        return numbers.astype(shape.dtype).reshape(shape.shape)

    return jax.jit(fill)()


def _pool(shapes: Any) -> Pages:
    """A filled pool; with 8 bits, cells times scales are between -1 and 1 too."""
    parts = [_filled(part, 2 + i) for i, part in enumerate(jax.tree.leaves(shapes))]
    if not isinstance(shapes, QuantizedPages):
        return jax.tree.unflatten(jax.tree.structure(shapes), parts)
    cells, scales = parts
    largest = LARGEST["int8"] if cells.dtype == jnp.int8 else 1
    return QuantizedPages(cells, jnp.abs(scales) / largest)


def _page_table(case: Case, page_size: int) -> np.ndarray:
    """Each row's pages, shuffled; entries past its length are the null page."""
    used_B = [-(-kv_len // page_size) for kv_len in case.kv_len]
    page_ids = np.random.default_rng(0).permutation(np.arange(1, 1 + sum(used_B)))
    table_BM = np.zeros((len(used_B), max(used_B)), np.int32)
    ends = np.cumsum(used_B)
    for row, (end, used) in enumerate(zip(ends, used_B, strict=True)):
        table_BM[row, :used] = page_ids[end - used : end]
    return table_BM


def _rows(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    query_len_B = np.array(case.query_len, np.int32)
    start_B = (np.cumsum(query_len_B) - query_len_B).astype(np.int32)
    return np.array(case.kv_len, np.int32), start_B, query_len_B


HEADER = ("case", "by", "error", "us", "+-", "MB", "GFLOP", "GB/s", "bandwidth", "peak")


def timing_table(results: Sequence[Result], ceilings: Ceilings) -> str:
    """One line per case and implementation; the larger of the two fractions is its bound."""
    return table(HEADER, [_timing_row(result, ceilings) for result in results], left=2)


def _timing_row(result: Result, ceilings: Ceilings) -> tuple[str, ...]:
    named = (result.case, result.implementation)
    timing, work = result.timing, result.work
    if timing is None:
        return (*named, result.why_not or "")
    spread = (timing.slowest_s - timing.fastest_s) / 2 / timing.median_s
    return (
        *named,
        _error_cell(result),
        figure(timing.median_s * 1e6),
        f"{spread * 100:.0f} %",
        figure(work.num_bytes / 1e6),
        figure(work.num_flops / 1e9),
        figure(work.num_bytes / timing.median_s / 1e9),
        percent(result.bandwidth_share(ceilings)),
        percent(result.flops_share(ceilings)),
    )


def _error_cell(result: Result) -> str:
    if result.error is None:
        return "not checked"
    return f"{'WRONG ' if result.is_wrong else ''}{result.error:.0e}"
