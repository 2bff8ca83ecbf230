"""The answer, in float32 and one row at a time. Slow; every implementation must equal it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.pages import (
    Pages,
    QuantizedPages,
    cells_of,
    new_cells,
    scales_of,
    widened,
)


def paged_attention_reference(  # noqa: PLR0913 - the contract of every implementation
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
) -> tuple[np.ndarray, Any]:
    """Writes the new keys and values, then softmax(scale * q k) v over each row's own past.

    Takes concrete arrays, returns float32 outputs and the updated pool. The content of the null
    page is not part of the answer. Arguments: see `paged_attention_xla`.
    """
    cells, scales = np.array(cells_of(pages)), np.array(scales_of(pages))
    page_size, half = cells.shape[3], cells.shape[4] // 2
    group, (_, _, head_dim) = q_TNH.shape[1] // k_TKH.shape[1], q_TNH.shape
    has_scales = isinstance(pages, QuantizedPages)
    # The pool may store wider heads: zeros pad them.
    k_TKH, v_TKH = widened(pages, k_TKH, v_TKH)
    new_TK2H, new_scales_TK2 = map(np.asarray, new_cells(k_TKH, v_TKH, pages))
    out_TNH = np.zeros(q_TNH.shape, np.float32)
    rows = list(zip(page_table_BM, kv_len_B, query_start_B, query_len_B, strict=True))
    rows = [(np.asarray(page_ids), *map(int, lengths)) for page_ids, *lengths in rows]
    for page_ids, kv_len, start, count in rows:
        position = np.arange(kv_len - count, kv_len)
        page, offset = page_ids[position // page_size], position % page_size
        cells[layer, page, :, offset] = new_TK2H[start : start + count]
        if has_scales:
            scales[layer, page, :, :, offset] = new_scales_TK2[start : start + count]
    for page_ids, kv_len, start, count in rows:
        key = np.arange(kv_len)
        page, offset = page_ids[key // page_size], key % page_size
        kv_SK2H = cells[layer, page, :, offset].astype(np.float32)
        if has_scales:
            kv_SK2H *= np.repeat(scales[layer, page, :, :, offset], half, axis=-1)
        kv_SN2H = np.repeat(kv_SK2H, group, axis=1)
        for i in range(count):
            position = kv_len - count + i
            low = 0 if window is None else max(0, position - window + 1)
            seen_SN2H = kv_SN2H[low : position + 1]
            q_NH = np.asarray(q_TNH[start + i], np.float32)
            score_SN = scale * np.einsum("NH,SNH->SN", q_NH, seen_SN2H[..., :head_dim])
            if soft_cap is not None:
                score_SN = soft_cap * np.tanh(score_SN / soft_cap)
            sink_1N = np.full((1, group * k_TKH.shape[1]), -np.inf, np.float32)
            if sinks_N is not None:
                sink_1N = np.asarray(sinks_N, np.float32)[None]
            peak_1N = np.maximum(score_SN.max(axis=0, keepdims=True), sink_1N)
            weight_SN = np.exp(score_SN - peak_1N)
            total_1N = weight_SN.sum(axis=0, keepdims=True) + np.exp(sink_1N - peak_1N)
            value_SNH = seen_SN2H[..., half : half + head_dim]
            out_TNH[start + i] = np.einsum("SN,SNH->NH", weight_SN / total_1N, value_SNH)
    if not has_scales:
        return out_TNH, cells
    return out_TNH, QuantizedPages(jnp.asarray(cells), jnp.asarray(scales))
