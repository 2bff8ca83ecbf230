"""Paged attention for Hopper and Blackwell GPUs (Mosaic GPU Pallas): TMA copies the pages.

This file writes the new cells, cuts the work into tiles and combines their parts; `gpu_attend.py`
holds the kernel, `gpu_tiles.py` the tile sizes. Nothing here has run on a GPU yet: interpret mode
proves the numbers, compiling ahead of time for H200 and B200 the programs. Needs jax 0.11 or newer.

Beside the usual axis letters (T N K G H L P Z B M), in these files:
X  tiles in the work list          U  query tokens in a tile
C  parts of a tile's context       Q  query rows of one kv head in a tile: U * G, padded to 8s
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import backend
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.contract import check_arguments
from kernels_pallas.paged_attention.gpu_tiles import BLOCK_TOKENS, QUERY_ROWS_OF_UNIT
from kernels_pallas.paged_attention.pages import Pages, QuantizedPages, cells_of, widened
from kernels_pallas.paged_attention.xla import _cut, _Rows, _write

DTYPES = ("bfloat16", "float16")
# 128 kB of 16-bit keys and values in flight, 64 kB at head_dim 64. Untuned: no chip was at hand.
STAGES_OF_HEAD_WIDTH = {64: 4, 128: 4, 256: 2}
# A part below this many tokens is not worth its own block and its place in the combination.
MIN_PART_TOKENS = 512
MULTIPROCESSORS_OF_UNIT = {"wgmma": 132, "tcgen05": 148}  # of an H100 or H200, of a B200
UNIT_OF_CAPABILITY = {"9": "wgmma", "10": "tcgen05"}  # of compute capability 9.0, 10.0, 10.3
# Names of Hopper chips: a mesh describes its chip by name only.
HOPPER = ("H100", "H200", "H800", "H20")


def paged_attention_gpu(  # noqa: PLR0913 - the contract of every implementation
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
    num_parts: int | None = None,
    unit: str | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "T N H"], Pages]:
    """Same contract as `paged_attention_xla`, whose docstring explains the shared arguments.

    XLA writes the new cells and packs the queries into tiles. Each block of the kernel then
    attends for one kv head from one tile to its row's context, or to a part of it.

    Args:
      q_TNH: packed new queries in the pool's dtype, bfloat16 or float16; bfloat16 if the pool
        has 8 bits. The same holds for k and v.
      k_TKH: their keys.
      v_TKH: their values.
      pages: the pool of all layers; bfloat16 or float16, or int8 or float8_e4m3fn with scales.
      layer: which layer of the pool; may be traced.
      page_table_BM: page ids of each row; entries past the length are not read.
      kv_len_B: tokens visible to the row, including this step's.
      query_start_B: the row's first token in T; rows may come in any order.
      query_len_B: the row's number of tokens in T; 0 for an empty row.
      scale: factor on the scores.
      window: positions a query sees; blocks of 64 keys before it are not read.
      soft_cap: bound on the scores.
      sinks_N: an extra logit per head.
      tile_tokens: query tokens of a tile, at most 64 / G (128 / G with tcgen05). None = 1 if there
        are no more tokens than rows, as in a step that only decodes, else the maximum.
      num_parts: blocks that split a tile's context; their results are combined by their weights.
        None = enough to occupy the chip, each at least 512 tokens of the page table's width.
      unit: the matrix unit, "wgmma" or "tcgen05". None = the chip's own, or wgmma in interpret
        mode.
      interpret: True or `plgpu.InterpretGPUParams(...)` to simulate the kernel on a CPU.

    Returns:
      Outputs in q's dtype, and the pool. A token of no row gets output 0 and is written to the
      null page.

    Raises:
      ValueError: if shapes or integer dtypes disagree, or a tile size is out of range.
      NotImplementedError: for a chip other than Hopper and Blackwell (sm_100), jax before 0.11,
        or an unsupported dtype, page size, group or head_dim of the pool. The heads' own head_dim
        may be any up to 256: `stored_head_dim` returns the pool's.

    Donates: as `paged_attention_xla`.
    Cost: reads each visible page once per tile; copies of queries and outputs take at least 8
      rows per token and kv head.
    Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867; splitting the context,
      Hong et al., arXiv:2311.01282; a warpgroup that only copies, Shah et al., arXiv:2407.08608.
    """
    rows = _Rows(kv_len_B, query_start_B, query_len_B)
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
    _check_arrays(q_TNH, k_TKH, v_TKH, pages)
    _check_jax()
    unit = unit or ("wgmma" if interpret else _unit_of_chip())
    _check_unit(unit, pages)
    # That file imports names that jax before 0.11 lacks.
    from kernels_pallas.paged_attention.gpu_attend import AttendOptions, attend_tiles

    head_dim = q_TNH.shape[2]
    q_TNH, k_TKH, v_TKH = widened(pages, q_TNH, k_TKH, v_TKH)
    _, num_pages, num_kv_heads, page_size, _ = cells_of(pages).shape
    (num_tokens, num_q_heads, stored_width), num_rows = q_TNH.shape, page_table_BM.shape[0]
    group = num_q_heads // num_kv_heads
    most_tokens = QUERY_ROWS_OF_UNIT[unit] // group
    tile_tokens = _tile_tokens(tile_tokens, most_tokens, num_tokens, num_rows)
    num_tiles = min(num_tokens, (num_tokens + num_rows * (tile_tokens - 1)) // tile_tokens)
    context_tokens = page_table_BM.shape[1] * page_size
    num_parts = _num_parts(num_parts, num_tiles * num_kv_heads, context_tokens, unit)

    pages = _write(pages, k_TKH, v_TKH, layer, page_table_BM, rows)
    tiles, _ = _cut(rows, num_tokens, tile_tokens, num_tiles, window)
    columns = (tiles.row_X, tiles.first_X, tiles.last_X, tiles.position_XU[:, 0])
    out_XCKQH, log_XCKQ = attend_tiles(
        jnp.stack(columns, axis=1),
        page_table_BM + layer * num_pages,
        _tiled(q_TNH, tiles.token_XU, num_kv_heads),
        jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), pages),
        AttendOptions(
            group=group,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            num_parts=num_parts,
            num_stages=STAGES_OF_HEAD_WIDTH[stored_width],
            unit=unit,
            interpret=interpret,
        ),
    )
    num_used = tile_tokens * group
    out_XCKQH, log_XCKQ = out_XCKQH[:, :, :, :num_used], log_XCKQ[..., :num_used]
    out_XKQH = _combined(out_XCKQH, log_XCKQ, sinks_N)
    return _untiled(out_XKQH, tiles.token_XU, q_TNH)[..., :head_dim], pages


def stored_head_dim(head_dim: int) -> int:
    """The smallest head_dim of a pool that the kernel supports and that holds these heads.

    Raises:
      NotImplementedError: if no supported head_dim is that large.
    """
    for stored_width in STAGES_OF_HEAD_WIDTH:
        if head_dim <= stored_width:
            return stored_width
    raise NotImplementedError(
        f"on GPU, heads are at most {max(STAGES_OF_HEAD_WIDTH)} wide; got {head_dim=}. "
        "Choose the xla implementation."
    )


def _check_arrays(q_TNH: Any, k_TKH: Any, v_TKH: Any, pages: Pages) -> None:
    _check_dtypes(q_TNH, k_TKH, v_TKH, pages)
    _, _, num_kv_heads, page_size, cell_width = cells_of(pages).shape
    stored_width = cell_width // 2
    if stored_width not in STAGES_OF_HEAD_WIDTH:
        allowed = sorted(STAGES_OF_HEAD_WIDTH)
        raise NotImplementedError(
            f"on GPU, the pool's head_dim must be one of {allowed}; got {stored_width}. "
            f"Allocate it with {stored_head_dim(stored_width)}, which pads the heads with zeros, "
            "or choose the xla implementation."
        )
    # A copy to shared memory starts at a multiple of 128 bytes, which is 32 tokens of scales.
    smallest = 32 if isinstance(pages, QuantizedPages) else 8
    sizes = [size for size in (8, 16, 32) if size >= smallest]
    if page_size not in sizes and page_size % BLOCK_TOKENS:
        kind = "8-bit" if isinstance(pages, QuantizedPages) else "16-bit"
        raise NotImplementedError(
            f"on GPU, {kind} pages hold {', '.join(map(str, sizes))} or a multiple of "
            f"{BLOCK_TOKENS} tokens; got {page_size=}. "
            "Choose another one, or the xla implementation."
        )
    group = q_TNH.shape[1] // num_kv_heads
    most_heads = min(QUERY_ROWS_OF_UNIT.values())
    if group > most_heads:
        raise NotImplementedError(
            f"on GPU, a kv head serves at most {most_heads} query heads; got {group}. "
            "Choose the xla implementation."
        )


def _check_dtypes(q_TNH: Any, k_TKH: Any, v_TKH: Any, pages: Pages) -> None:
    dtypes = {str(array.dtype) for array in (q_TNH, k_TKH, v_TKH)}
    if isinstance(pages, QuantizedPages):
        # In float16 a small softmax weight times a small scale would underflow.
        rule, allowed = "beside 8-bit pages q, k and v must all be bfloat16", {"bfloat16"}
    else:
        dtypes.add(str(pages.dtype))
        rule, allowed = f"q, k, v and pages must all be {' or all '.join(DTYPES)}", set(DTYPES)
    if len(dtypes) > 1 or not dtypes <= allowed:
        raise NotImplementedError(
            f"on GPU, {rule}; got {', '.join(sorted(dtypes))}. "
            "Convert them, or choose the xla implementation."
        )


def _check_jax() -> None:
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"paged attention on GPU needs jax >= 0.11; got {jax.__version__}. "
            "Update jax, or choose the xla implementation."
        )


def _check_unit(unit: str, pages: Pages) -> None:
    if unit not in QUERY_ROWS_OF_UNIT:
        raise ValueError(
            f"unit must be {' or '.join(QUERY_ROWS_OF_UNIT)}; got {unit=}. "
            "Leave it out for the chip's own."
        )
    if unit == "tcgen05" and cells_of(pages).shape[4] > 2 * 128:
        # With 128 rows a thread holds one whole row, in 255 registers.
        raise NotImplementedError(
            "on Blackwell, the pool's head_dim must be 64 or 128; "
            f"got {cells_of(pages).shape[4] // 2}. Choose the xla implementation."
        )


def _unit_of_chip() -> str:
    here = backend.get_default_device()
    # The chip that is compiled for: the mesh may name one that is not present.
    device = jax.sharding.get_abstract_mesh().abstract_device or here
    if device.device_kind == here.device_kind:
        device = here  # a real device also has its compute capability
    capability = getattr(device, "compute_capability", None)
    if capability is None and any(name in device.device_kind for name in HOPPER):
        capability = "9.0"
    unit = UNIT_OF_CAPABILITY.get(str(capability).split(".")[0])
    if device.platform not in ("gpu", "cuda") or unit is None:
        raise NotImplementedError(
            "paged attention on GPU needs a Hopper or Blackwell chip that tells its compute "
            f"capability, 9.0 or 10.x; got {device.device_kind}, {capability}. "
            'Choose the xla implementation, attention="xla_wide".'
        )
    return unit


def _tile_tokens(asked: int | None, most: int, num_tokens: int, num_rows: int) -> int:
    if asked is None:
        return 1 if num_tokens <= num_rows else most
    if not 1 <= asked <= most:
        raise ValueError(
            f"tile_tokens must be from 1 to {most}, the rows of a matrix product over the query "
            f"heads per kv head; got tile_tokens={asked}. Leave it out for the default."
        )
    return asked


def _num_parts(asked: int | None, num_blocks: int, context_tokens: int, unit: str) -> int:
    if asked is None:
        wanted = 2 * MULTIPROCESSORS_OF_UNIT[unit] // num_blocks
        return max(1, min(wanted, context_tokens // MIN_PART_TOKENS))
    if asked < 1:
        raise ValueError(
            f"num_parts must be >= 1; got num_parts={asked}. Leave it out for the default."
        )
    return asked


def _tiled(
    q_TNH: Float[Array, "T N H"], token_XU: Int32[Array, "X U"], num_kv_heads: int
) -> Float[Array, "X K Q H"]:
    num_tiles, tile_tokens = token_XU.shape
    q_XUNH = q_TNH.at[token_XU].get(mode="fill", fill_value=0)
    q_XUKGH = q_XUNH.reshape(num_tiles, tile_tokens, num_kv_heads, -1, q_TNH.shape[2])
    q_XKQH = q_XUKGH.swapaxes(1, 2).reshape(num_tiles, num_kv_heads, -1, q_TNH.shape[2])
    return jnp.pad(q_XKQH, ((0, 0), (0, 0), (0, -q_XKQH.shape[2] % 8), (0, 0)))


def _untiled(
    out_XKQH: Float[Array, "X K Q H"], token_XU: Int32[Array, "X U"], q_TNH: Any
) -> Float[Array, "T N H"]:
    (num_tiles, tile_tokens), num_kv_heads = token_XU.shape, out_XKQH.shape[1]
    out_XKUGH = out_XKQH.reshape(num_tiles, num_kv_heads, tile_tokens, -1, q_TNH.shape[2])
    out_XUNH = out_XKUGH.swapaxes(1, 2).reshape(num_tiles, tile_tokens, *q_TNH.shape[1:])
    return jnp.zeros_like(q_TNH).at[token_XU].set(out_XUNH, mode="drop")


def _combined(
    out_XCKQH: Float[Array, "X C K Q H"],
    log_XCKQ: Float[Array, "X C K Q"],
    sinks_N: Float[Array, "N"] | None,
) -> Float[Array, "X K Q H"]:
    """Averages the parts' outputs by their total weights, given as log2."""
    _, num_parts, num_kv_heads, num_rows = log_XCKQ.shape
    if num_parts == 1 and sinks_N is None:
        return out_XCKQH[:, 0]
    peak_XKQ = jnp.max(log_XCKQ, axis=1)
    if sinks_N is not None:
        sinks_KG = sinks_N.astype(jnp.float32).reshape(num_kv_heads, -1) * jnp.log2(jnp.e)
        sinks_KQ = jnp.tile(sinks_KG, (1, num_rows // sinks_KG.shape[1]))
        peak_XKQ = jnp.maximum(peak_XKQ, sinks_KQ)
    weight_XCKQ = jnp.exp2(log_XCKQ - peak_XKQ[:, None])
    total_XKQ = jnp.sum(weight_XCKQ, axis=1)
    if sinks_N is not None:
        total_XKQ += jnp.exp2(sinks_KQ - peak_XKQ)
    out_XKQH = jnp.sum(out_XCKQH * weight_XCKQ[..., None], axis=1) / total_XKQ[..., None]
    return out_XKQH.astype(out_XCKQH.dtype)
