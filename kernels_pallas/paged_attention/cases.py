"""Shapes that every implementation must pass; shared by tests, benchmarks and tuners."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels_pallas.paged_attention.pages import QuantizedPages, quantize


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One step: each row's visible and new tokens, and the shapes of the model and the pool."""

    name: str
    kv_len: tuple[int, ...]  # tokens, including new ones; 0 = a row never used
    query_len: tuple[int, ...]  # tokens; 0 = a row without work
    num_padding: int = 3  # tokens of no row
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 8  # tokens
    spare_pages: int = 2  # page-table entries past the longest row
    dtype: str = "float32"
    pages_dtype: str | None = None  # None = dtype; 8-bit pages have scales
    stored_width: int | None = None  # head_dim of the pool; None = head_dim
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        rows = zip(self.kv_len, self.query_len, strict=True)
        assert all(0 <= new <= visible for visible, new in rows), self


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """`fn(*args, **options)` for any implementation, and a mask of the tokens with an answer."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    owned_T: np.ndarray  # False where a token belongs to no row


NUM_LAYERS, LAYER = 3, 1
LENGTHS_AT_EDGES = (7, 8, 9, 15, 16, 17, 1, 24)


def _mixed(name: str, **changes: Any) -> Case:
    """Two decoding rows, a whole prompt, and two chunks; `changes` override the defaults."""
    return Case(name=name, kv_len=(33, 12, 1, 40, 9), query_len=(1, 12, 1, 20, 5), **changes)


CASES = (
    Case(name="decode_at_page_edges", kv_len=LENGTHS_AT_EDGES, query_len=(1,) * 8),
    Case(name="prefill_at_page_edges", kv_len=LENGTHS_AT_EDGES, query_len=LENGTHS_AT_EDGES),
    Case(name="one_token", kv_len=(9,), query_len=(1,), num_padding=0),
    Case(name="one_page", kv_len=(5,), query_len=(5,), spare_pages=0),
    Case(name="all_pages", kv_len=(64,), query_len=(34,), spare_pages=0, num_padding=0),
    Case(name="empty_rows", kv_len=(0, 50, 12, 0, 9), query_len=(0, 40, 0, 0, 1)),
    Case(name="nothing_to_do", kv_len=(0, 12), query_len=(0, 0)),
    Case(name="chunk_starts_mid_page", kv_len=(21, 43), query_len=(10, 30)),
    Case(name="verify_5_tokens", kv_len=(12, 17, 25, 5, 40, 8, 9), query_len=(5,) * 7),
    _mixed("prefill_and_decode"),
    _mixed("big_pages", page_size=64),
    _mixed("group_1", num_q_heads=2, num_kv_heads=2),
    _mixed("group_3", num_q_heads=9, num_kv_heads=3),
    _mixed("group_4", num_q_heads=4, num_kv_heads=1),
    _mixed("group_8", num_q_heads=16, num_kv_heads=2),
    _mixed("group_16", num_q_heads=16, num_kv_heads=1),
    _mixed("width_96", head_dim=96),
    _mixed("width_128", head_dim=128),
    _mixed("width_256", head_dim=256),
    _mixed("window", window=6),
    _mixed("window_of_one", window=1),
    _mixed("soft_cap", soft_cap=0.5),
    _mixed("sinks", sinks=True),
    _mixed("window_soft_cap_sinks", window=11, soft_cap=2.0, sinks=True),
    _mixed("bfloat16", dtype="bfloat16"),
    _mixed("bfloat16_sinks", dtype="bfloat16", window=11, sinks=True),
    _mixed("float16", dtype="float16"),
    _mixed("width_96_stored_as_128", head_dim=96, stored_width=128),
    _mixed("int8_pages", pages_dtype="int8"),
    _mixed("fp8_pages", pages_dtype="float8_e4m3fn", page_size=32),
    _mixed("int8_pages_of_width_128", pages_dtype="int8", head_dim=128, page_size=32),
    _mixed("int8_pages_all_options", pages_dtype="int8", window=11, soft_cap=2.0, sinks=True),
    _mixed("bfloat16_int8_pages", dtype="bfloat16", pages_dtype="int8", page_size=64),
    _mixed("bfloat16_fp8_pages", dtype="bfloat16", pages_dtype="float8_e4m3fn", sinks=True),
)


def build(case: Case, seed: int = 0) -> Inputs:
    """Makes a case's random arrays: shuffled pages and rows, and NaN where no row reads.

    NaN fills other layers, unused pages, cells past each row's old tokens, and the tokens of no
    row, half of them before all rows and half after. Page-table entries past a row's length are
    random page ids.
    """
    rng = np.random.default_rng(seed)
    kv_len_B, query_len_B = np.array(case.kv_len), np.array(case.query_len)
    start_B = _starts(rng, query_len_B, case.num_padding)
    num_tokens = int(query_len_B.sum()) + case.num_padding
    token_T = np.arange(num_tokens)[:, None]
    owned_T = np.any((start_B <= token_T) & (token_T < start_B + query_len_B), axis=1)

    def draw(num_heads: int) -> Any:
        values = rng.standard_normal((num_tokens, num_heads, case.head_dim))
        return jnp.asarray(np.where(owned_T[:, None, None], values, np.nan), case.dtype)

    page_table_BM, num_pages = _page_table(rng, case)
    pages = _poisoned_pages(rng, case, page_table_BM, num_pages)
    sinks_N = rng.standard_normal(case.num_q_heads)
    return Inputs(
        args=(
            draw(case.num_q_heads),
            draw(case.num_kv_heads),
            draw(case.num_kv_heads),
            pages,
            LAYER,
            *(jnp.asarray(a, jnp.int32) for a in (page_table_BM, kv_len_B, start_B, query_len_B)),
        ),
        options={
            "scale": case.head_dim**-0.5,
            "window": case.window,
            "soft_cap": case.soft_cap,
            "sinks_N": jnp.asarray(sinks_N, jnp.float32) if case.sinks else None,
        },
        owned_T=owned_T,
    )


def _starts(rng: np.random.Generator, query_len_B: np.ndarray, num_padding: int) -> np.ndarray:
    start_B = np.zeros_like(query_len_B)
    token = num_padding // 2
    for row in rng.permutation(len(query_len_B)):
        start_B[row] = token
        token += query_len_B[row]
    return start_B


def _page_table(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, int]:
    used_B = [-(-kv_len // case.page_size) for kv_len in case.kv_len]
    num_pages = 1 + sum(used_B) + 3  # the null page, all rows' pages, and 3 unused
    page_ids = iter(rng.permutation(np.arange(1, num_pages)))
    page_table_BM = rng.integers(0, num_pages, (len(used_B), max(used_B) + case.spare_pages))
    for row, used in enumerate(used_B):
        page_table_BM[row, :used] = [next(page_ids) for _ in range(used)]
    return page_table_BM, num_pages


def _poisoned_pages(
    rng: np.random.Generator, case: Case, page_table_BM: np.ndarray, num_pages: int
) -> Any:
    head_dim = case.stored_width or case.head_dim
    shape = (NUM_LAYERS, num_pages, case.num_kv_heads, case.page_size, 2 * head_dim)
    pages = np.full(shape, np.nan, np.float32)
    for row, (kv_len, query_len) in enumerate(zip(case.kv_len, case.query_len, strict=True)):
        for position in range(kv_len - query_len):
            page = page_table_BM[row, position // case.page_size]
            old_K2H = rng.standard_normal((case.num_kv_heads, 2, case.head_dim))
            old_K2H = np.pad(old_K2H, ((0, 0), (0, 0), (0, head_dim - case.head_dim)))
            old_K2H = old_K2H.reshape(case.num_kv_heads, -1)
            pages[LAYER, page, :, position % case.page_size] = old_K2H
    if case.pages_dtype is None:
        return jnp.asarray(pages, case.dtype)
    # One line per layer, page, head and token: the key, then the value.
    merged = jnp.asarray(pages).reshape(-1, 2, head_dim)
    cells, scales = quantize(merged, case.pages_dtype)
    # Quantizing turned NaN cells into garbage; their scales must stay NaN.
    scales = jnp.where(jnp.isnan(merged).any(-1), np.nan, scales)
    scales = scales.reshape(*pages.shape[:4], 2).swapaxes(3, 4)
    return QuantizedPages(cells.reshape(pages.shape), scales)
