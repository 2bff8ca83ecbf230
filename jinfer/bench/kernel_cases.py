"""The shapes at which kernels are timed: paged attention in serving an 8B Llama."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import jax.numpy as jnp

from kernels_pallas.paged_attention.cases import Case

KI = 1024
_SPOKEN = {"int8": "int8", "float8_e4m3fn": "fp8"}
# The limits of the small set: up to these, a case runs on a CPU within seconds.
SMALL_BYTES, SMALL_FLOPS = 1 << 28, 20e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The necessary work of one call, whatever its implementation."""

    num_bytes: int  # read and written, each once
    num_flops: int  # of the two matrix products, without masked positions
    pool_bytes: int  # of one layer's pages, held in memory


def decode(num_rows: int, context: int, **changes: str) -> Case:
    """A case in which every row computes one token and sees `context` tokens, including it."""
    return _case(f"decode_{num_rows}x{_short(context)}", [(context, 1)] * num_rows, **changes)


def _case(name: str, rows: list[tuple[int, int]], **changes: str) -> Case:

    kv_len, query_len = zip(*rows, strict=True)
    return Case(
        name="_".join([name, *(_SPOKEN[value] for value in changes.values())]),
        kv_len=kv_len,
        query_len=query_len,
        num_padding=0,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        spare_pages=0,
        **changes,  # pyright: ignore[reportArgumentType]
    )


def _short(num_tokens: int) -> str:
    return f"{num_tokens // KI}k" if num_tokens % KI == 0 else str(num_tokens)


_INT8, _FP8 = {"pages_dtype": "int8"}, {"pages_dtype": "float8_e4m3fn"}

# A run replaces the cases' activation dtype and page size with its own.
CASES = (
    *(decode(rows, ctx * KI) for ctx in (1, 8, 32, 128) for rows in (1, 16, 64, 256)),
    _case("prefill_1k", [(KI, KI)]),
    _case("prefill_8k", [(8 * KI, 8 * KI)]),
    _case("last_2k_of_8k", [(8 * KI, 2 * KI)]),
    _case("mixed_64x1k_512", [(KI, 1)] * 64 + [(512, 512)]),
    _case("verify_16x1k_5", [(KI, 5)] * 16),
    _case("verify_16x8k_5", [(8 * KI, 5)] * 16),
    decode(16, KI, **_INT8),
    decode(16, 8 * KI, **_INT8),
    decode(64, 8 * KI, **_INT8),
    decode(16, 8 * KI, **_FP8),
    decode(64, 8 * KI, **_FP8),
)


def chosen(patterns: list[str], *, small: bool, dtype: str) -> list[Case]:
    """The cases whose names match one of the patterns; without patterns, all or the small ones.

    Args:
      patterns: shell patterns such as "decode_*", or plain names.
      small: without patterns, choose only cases that a CPU runs within seconds.
      dtype: of activations, to count the work of a case.

    Raises:
      ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in CASES):
            names = ", ".join(case.name for case in CASES)
            raise ValueError(
                f"--cases must match the name of a case; got {pattern!r}. There are: {names}."
            )
    if patterns:
        return [c for c in CASES if any(fnmatchcase(c.name, pattern) for pattern in patterns)]
    return [c for c in CASES if not small or _is_small(work_of(c, dtype))]


def _is_small(work: Work) -> bool:
    return work.pool_bytes <= SMALL_BYTES and work.num_flops <= SMALL_FLOPS


def work_of(case: Case, dtype: str) -> Work:
    """Counts the necessary bytes and flops.

    A call reads old keys and values of every row once, reads and writes new ones once, reads
    queries and writes outputs. A scale of 8-bit pages counts 4 bytes.

    Args:
      case: one of CASES.
      dtype: of queries, keys, values and outputs.
    """
    itemsize = jnp.dtype(dtype).itemsize
    cell_bytes = 2 * case.head_dim * jnp.dtype(case.pages_dtype or dtype).itemsize
    if case.pages_dtype is not None:
        cell_bytes += 2 * 4
    rows = list(zip(case.kv_len, case.query_len, strict=True))
    num_new = sum(case.query_len)
    num_old = sum(visible - new for visible, new in rows if new)
    # Query i of n sees all but the n - 1 - i tokens after it.
    num_pairs = sum(new * visible - new * (new - 1) // 2 for visible, new in rows)
    moved_KH = 2 * num_new * case.head_dim * itemsize + (num_old + num_new) * cell_bytes
    moved_NH = 2 * num_new * case.num_q_heads * case.head_dim * itemsize
    return Work(
        num_bytes=case.num_kv_heads * moved_KH + moved_NH,
        num_flops=4 * case.num_q_heads * case.head_dim * num_pairs,
        pool_bytes=case.num_kv_heads * cell_bytes * sum(case.kv_len),
    )
