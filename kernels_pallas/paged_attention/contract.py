"""The contract of every paged-attention implementation in this folder, checked while tracing.

Shapes and dtypes are known while tracing, so checking them costs nothing at run time. Values
(page ids, lengths) are unknown then: the host that packs a step must get them right.
"""

from typing import Any

import jax.numpy as jnp

from kernels_pallas.paged_attention.pages import (
    LARGEST,
    PLAIN_DTYPES,
    Pages,
    QuantizedPages,
    cells_of,
    scales_of,
)


def check_arguments(
    q_TNH: Any,
    k_TKH: Any,
    v_TKH: Any,
    pages: Pages,
    page_table_BM: Any,
    rows: dict[str, Any],
    *,
    window: int | None,
    soft_cap: float | None,
    sinks_N: Any,
) -> None:
    """Raises if the arguments' shapes or dtypes disagree.

    Args:
      q_TNH: new queries.
      k_TKH: new keys.
      v_TKH: new values.
      pages: the stacked pool.
      page_table_BM: page ids of each row.
      rows: the per-row int32 arrays (`kv_len_B`, ...) by name.
      window: positions that a query sees, including its own; None = all.
      soft_cap: bound on the scores; None = none.
      sinks_N: one extra logit per query head; None = none.

    Raises:
      ValueError: if a shape, an integer dtype, `window` or `soft_cap` is wrong.
      NotImplementedError: if the dtype of the pool's cells is not in PLAIN_DTYPES, or with scales
        not in LARGEST.
    """
    _check_tokens(q_TNH, k_TKH, v_TKH)
    _check_pages(q_TNH, k_TKH, pages)
    _check_rows(page_table_BM, rows)
    num_q_heads = q_TNH.shape[1]
    if sinks_N is not None and sinks_N.shape != (num_q_heads,):
        raise ValueError(
            f"sinks_N needs one logit per query head, N={num_q_heads}; "
            f"got shape {sinks_N.shape}. Pass shape ({num_q_heads},) or None."
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1 token; got {window=}. Pass None for no window.")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be > 0; got {soft_cap=}. Pass None for no cap.")


def _check_tokens(q_TNH: Any, k_TKH: Any, v_TKH: Any) -> None:
    if q_TNH.ndim != 3 or k_TKH.ndim != 3 or k_TKH.shape != v_TKH.shape:
        raise ValueError(
            "q must be [T, N, H], k and v both [T, K, H]; "
            f"got {q_TNH.shape=}, {k_TKH.shape=}, {v_TKH.shape=}. Pack the new tokens that way."
        )
    (num_tokens, num_q_heads, width), (kv_tokens, num_kv_heads, kv_width) = q_TNH.shape, k_TKH.shape
    if (num_tokens, width) != (kv_tokens, kv_width):
        raise ValueError(
            "q and k must have the same number of tokens and head_dim; "
            f"got {q_TNH.shape=}, {k_TKH.shape=}. Project both from the same packed tokens."
        )
    if num_q_heads % num_kv_heads:
        raise ValueError(
            "the number of query heads must be a multiple of the kv heads; "
            f"got N={num_q_heads}, K={num_kv_heads}. Repeat the kv heads when loading weights."
        )


def _check_pages(q_TNH: Any, k_TKH: Any, pages: Pages) -> None:
    num_kv_heads, width = k_TKH.shape[1], q_TNH.shape[2]
    cells, scales = cells_of(pages), scales_of(pages)
    shape = cells.shape
    # A pool may store wider heads, padded with zeros.
    if len(shape) != 5 or shape[2] != num_kv_heads or shape[4] < 2 * width or shape[4] % 2:
        raise ValueError(
            f"pages are [L, P, K={num_kv_heads}, Z, 2H={2 * width}]; got shape {shape}. "
            "Allocate the pool for this model and this shard of its heads."
        )
    allowed = tuple(LARGEST) if isinstance(pages, QuantizedPages) else PLAIN_DTYPES
    if jnp.dtype(cells.dtype).name not in allowed:
        raise NotImplementedError(
            f"pages hold {', '.join(PLAIN_DTYPES)}, or with scales {', '.join(LARGEST)}; "
            f"got dtype={cells.dtype}. Allocate the pool in one of these."
        )
    if scales is None:
        return
    expected = (*shape[:3], 2, shape[3])
    if scales.shape != expected or scales.dtype != jnp.float32:
        raise ValueError(
            f"scales are float32 [L, P, K, 2, Z] = {expected}; got {scales.dtype} {scales.shape}. "
            "Allocate them with the pool."
        )


def _check_rows(page_table_BM: Any, rows: dict[str, Any]) -> None:
    if page_table_BM.ndim != 2:
        raise ValueError(
            f"the page table is [B, M]; got {page_table_BM.shape=}. "
            "Pass one line of page ids per row."
        )
    num_rows = page_table_BM.shape[0]
    for name, values_B in rows.items():
        if values_B.shape != (num_rows,):
            raise ValueError(
                f"{name} needs one number per line of the page table, B={num_rows}; "
                f"got shape {values_B.shape}. Pad both to the same number of rows."
            )
    for name, values in {"page_table_BM": page_table_BM, **rows}.items():
        if values.dtype != jnp.int32:
            raise ValueError(
                f"{name} must be int32; got dtype={values.dtype}. Convert it on the host."
            )
