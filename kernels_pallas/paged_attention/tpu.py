"""Paged attention for TPUs (Mosaic Pallas): write the new cells, then stream pages past queries.

This file checks arguments, chooses tile sizes and runs the passes; `tpu_work.py` cuts rows into
work lists, `tpu_write.py` writes the new cells, `tpu_attend.py` attends to the pages that
`tpu_stream.py` copies. Nothing here has run on a TPU yet: interpret mode proves the numbers,
compiling ahead of time for v4 to 7x the programs.

Beside the usual axis letters (T N K G H L P Z B M), in these files:
X  items of a work list              U  query tokens in a block
I  blocks of query tokens            Q  query rows of one kv head in a block, U * G, padded
C  pages in a block                  S  key positions in a block, C * Z
W  cells of a page written together  O  lanes of a query or an output: H, or 2H if joined
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.paged_attention.contract import check_arguments
from kernels_pallas.paged_attention.pages import LARGEST, Pages, cells_of, widened
from kernels_pallas.paged_attention.tpu_attend import LANES, AttendOptions, attend_rows
from kernels_pallas.paged_attention.tpu_work import Rows
from kernels_pallas.paged_attention.tpu_write import write_rows

DTYPES = ("float32", "bfloat16")
# Up to this many tokens there is one pass: a second one with wider blocks costs its launch.
FEW_TOKENS = 8
# Query rows of one kv head in a block: enough work per key that bandwidth does not bound prefill.
# The two limits below keep a kernel within 16 MB, the default limit of v5e.
MAX_QUERY_ROWS = 256
QUERY_BYTES = 8 * 1024 * 1024  # queries, outputs and online softmax, of all kv heads
BUFFER_BYTES = 2 * 1024 * 1024  # of one of the two page buffers
MAX_BLOCK_TOKENS = 512


def paged_attention_tpu(  # noqa: PLR0913 - the contract of every implementation
    q_TNH: Float[Array, "T N H"],
    k_TKH: Float[Array, "T K H"],
    v_TKH: Float[Array, "T K H"],
    pages: Pages,
    layer: int | Int32[Array, ""],
    page_table_BM: Int32[Array, "B M"],
    kv_len_B: Int32[Array, "B"],
    query_start_B: Int32[Array, "B"],
    query_len_B: Int32[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    tile_tokens: int | None = None,
    block_tokens: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "T N H"], Pages]:
    """Same contract as `paged_attention_xla`, whose docstring explains the shared arguments.

    The first pass attends for rows with one new token, one token per block. The second pass
    attends for all other rows; its blocks are aligned to `tile_tokens` packed tokens, and all rows
    with tokens in a block share it. In a pass, whole pages (all kv heads) stream from HBM through
    two buffers: while the kernel computes on one block, the next is copied.

    Args:
      q_TNH: packed new queries; float32 or bfloat16, as are k and v.
      k_TKH: their keys; stored in the pool's dtype.
      v_TKH: their values; likewise.
      pages: the pool of all layers; float32 or bfloat16, or int8 or float8_e4m3fn with scales.
      layer: which layer of the pool; may be traced.
      page_table_BM: page ids of each row. The kernel copies one line at a time to scalar memory,
        so its size limits neither B * M nor the context.
      kv_len_B: tokens visible to the row, including this step's.
      query_start_B: the row's first token in T; rows may come in any order.
      query_len_B: the row's number of tokens in T; 0 for an empty row, which costs nothing.
      scale: factor on the scores.
      window: positions a query sees; pages before it are not read.
      soft_cap: bound on the scores.
      sinks_N: an extra logit per head.
      tile_tokens: query tokens of a block in the second pass; 1 drops that pass, which suits
        a program that only decodes, and 8 suits one that verifies a few draft tokens per
        row. None = 256 query rows per kv head, or fewer to fit 8 MiB.
      block_tokens: key positions per block, rounded to whole pages. None = 512, or fewer to
        fit 2 MiB.
      interpret: as in `pallas_call`: False, or `pltpu.InterpretParams(...)` to run on a CPU.

    Returns:
      Outputs in q's dtype, and the pool. A token of no row gets output 0 and is not written;
      the null page may be rewritten with its own content.

    Raises:
      ValueError: if shapes or integer dtypes disagree, or a tile size is below 1.
      NotImplementedError: if a dtype is another one, or the pool's head_dim is not a multiple
        of 64. The heads' own head_dim may be smaller: `stored_head_dim` returns the pool's.

    Donates: nothing by itself; inside a jit that donates the pool the update is in place.
    Sharding: call it inside `jax.shard_map(..., check_vma=False)` with all heads sharded along K.
    Cost: reads each visible page once per block of query tokens; writing reads and writes
      16 cells (8 in float32) around the new cells.
    Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867; paging, Kwon et al.,
      arXiv:2309.06180; sinks as in gpt-oss, arXiv:2508.10925.
    """
    rows = Rows(kv_len_B, query_start_B, query_len_B)
    check_arguments(
        q_TNH,
        k_TKH,
        v_TKH,
        pages,
        page_table_BM,
        rows._asdict(),
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
    )
    head_dim = q_TNH.shape[2]
    q_TNH, k_TKH, v_TKH = widened(pages, q_TNH, k_TKH, v_TKH)
    _check_limits(cells_of(pages), q=q_TNH, k=k_TKH, v=v_TKH)
    tile_tokens = _fitting_tile(q_TNH, k_TKH.shape[1]) if tile_tokens is None else tile_tokens
    block_tokens = _fitting_block(cells_of(pages)) if block_tokens is None else block_tokens
    if min(tile_tokens, block_tokens) < 1:
        raise ValueError(
            f"tile sizes must be >= 1; got {tile_tokens=}, {block_tokens=}. "
            "Leave them out for the defaults."
        )
    pages = write_rows(k_TKH, v_TKH, pages, layer, page_table_BM, rows, interpret=interpret)
    options = AttendOptions(scale, window, soft_cap, block_tokens, interpret)

    def attend(chosen: Rows, tile_tokens: int) -> Float[Array, "T N H"]:
        where = (pages, layer, page_table_BM)
        out_TNH = attend_rows(q_TNH, sinks_N, *where, chosen, tile_tokens, options)
        return out_TNH[..., :head_dim]

    num_tokens = q_TNH.shape[0]
    if tile_tokens == 1 or num_tokens <= FEW_TOKENS:
        return _where(_owned(rows, num_tokens), attend(rows, 1), 0), pages
    single_B = query_len_B == 1
    decoding = rows._replace(query_len_B=jnp.where(single_B, 1, 0))
    prefilling = rows._replace(query_len_B=jnp.where(single_B, 0, query_len_B))
    out_TNH = _where(_owned(decoding, num_tokens), attend(decoding, 1), 0)
    wide_T = _owned(prefilling, num_tokens)
    return _where(wide_T, attend(prefilling, tile_tokens), out_TNH), pages


def stored_head_dim(head_dim: int) -> int:
    """The head_dim of a pool whose cells are whole rows of lanes."""
    return -(-2 * head_dim // LANES) * LANES // 2


def _check_limits(cells: Any, **arrays: Any) -> None:
    if cells.shape[3] % 8:
        raise NotImplementedError(
            f"on TPU, a page holds a multiple of 8 tokens; got page_size={cells.shape[3]}. "
            "Choose another page size, or the xla implementation."
        )
    for name, values in {"pages": cells, **arrays}.items():
        allowed = (*DTYPES, *LARGEST) if name == "pages" else DTYPES
        if jnp.dtype(values.dtype).name not in allowed:
            raise NotImplementedError(
                f"on TPU, {name} must be {' or '.join(allowed)}; "
                f"got dtype={values.dtype}. Convert it, or choose the xla implementation."
            )
    head_dim = cells.shape[4] // 2
    if stored_head_dim(head_dim) != head_dim:
        # It would compile, but XLA would lay the pool out differently and copy it on every call.
        raise NotImplementedError(
            f"on TPU, the pool's head_dim must be a multiple of {LANES // 2}; got {head_dim=}. "
            f"Allocate it with {stored_head_dim(head_dim)}, or choose the xla implementation."
        )


def _fitting_tile(q_TNH: Float[Array, "T N H"], num_kv_heads: int) -> int:
    _, num_q_heads, head_dim = q_TNH.shape
    lanes = head_dim if head_dim % LANES == 0 else 2 * head_dim
    # Two buffers each of queries, outputs and first peaks; one of peak, total and weighted values.
    # A column of float32 takes whole rows of lanes.
    row_bytes = lanes * (4 * q_TNH.dtype.itemsize + 4) + LANES * 4 * 4
    num_rows = min(MAX_QUERY_ROWS, QUERY_BYTES // (num_kv_heads * row_bytes))
    group = num_q_heads // num_kv_heads
    return max(8, num_rows // group // 8 * 8)


def _fitting_block(cells_LPKZ2H: Array) -> int:
    _, _, num_kv_heads, page_size, width = cells_LPKZ2H.shape
    token_bytes = num_kv_heads * width * cells_LPKZ2H.dtype.itemsize
    return max(page_size, min(MAX_BLOCK_TOKENS, BUFFER_BYTES // token_bytes))


def _owned(rows: Rows, num_tokens: int) -> Bool[Array, "T"]:
    token_T1 = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    end_B = rows.query_start_B + rows.query_len_B
    return jnp.any((rows.query_start_B <= token_T1) & (token_T1 < end_B), axis=1)


def _where(mask_T: Bool[Array, "T"], yes_TNH: Any, no_TNH: Any) -> Float[Array, "T N H"]:
    return jnp.where(mask_T[:, None, None], yes_TNH, no_TNH)
