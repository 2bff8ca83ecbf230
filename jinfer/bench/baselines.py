"""Other implementations of paged attention on GPUs, to time beside ours.

They only attend: new keys and values are in their pages already, while ours also write them. Both
compile ahead of time for an H200; neither has run beside ours yet, since no GPU was at hand.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jinfer.step.attention import ATTENTION
from kernels_pallas.compat import cudnn_attention
from kernels_pallas.paged_attention.cases import Case
from kernels_pallas.paged_attention.pages import Pages, QuantizedPages

_TRITON_PAGES = 8  # pages per block, the kernel's default
KeysAndValues = tuple[Array, Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """An implementation with the same call as ours, on pages in its own layout."""

    attend: Callable[..., tuple[Any, Any]]
    split: Callable[[Pages], KeysAndValues]  # converts our pool to its keys and values
    variants: tuple[dict[str, int], ...]  # all are timed, the fastest counts
    most_layers: int | None = None  # the most layers its pool may have; None = any


def implementation(name: str) -> Callable[..., tuple[Any, Any]]:
    """One of our implementations or a baseline, by name."""
    return BASELINES[name].attend if name in BASELINES else ATTENTION[name]


def names_for(case: Case, names: tuple[str, ...], platform: str) -> tuple[str, ...]:
    """These names, and the baselines that support the case."""
    decodes = all(length == 1 for length in case.query_len)
    takes = platform == "gpu" and decodes and case.pages_dtype is None
    return (*names, *BASELINES) if takes else names


def _attend_triton(
    q_BNH: Float[Array, "B N H"],
    k_BKH: Float[Array, "B K H"],
    v_BKH: Float[Array, "B K H"],
    pages: KeysAndValues,  # [K, L, P, Z, H] each
    layer: int | Int32[Array, ""],
    table_BM: Int32[Array, "B M"],
    kv_len_B: Int32[Array, "B"],
    *_: Any,
    scale: float,
    num_parts: int = 16,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], KeysAndValues]:
    """JAX's own Pallas kernel on Triton, which JAX has deprecated."""
    _check_decodes(q_BNH, table_BM)
    part_pages, rest = divmod(table_BM.shape[1], num_parts)
    if rest or (part_pages > _TRITON_PAGES and part_pages % _TRITON_PAGES):
        raise NotImplementedError(
            f"triton cuts rows into {num_parts} parts of whole blocks of {_TRITON_PAGES} pages; "
            f"got {table_BM.shape[1]} pages. Choose another page size."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # known, and irrelevant to users
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

        out_BNH = paged_attention(
            q_BNH * scale,  # the kernel has no scale
            *(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in pages),
            table_BM + layer * pages[0].shape[2],
            kv_len_B,
            k_splits=num_parts,
            interpret=interpret,
        )
    return out_BNH.astype(q_BNH.dtype), pages


def _split_for_triton(pages: Pages) -> KeysAndValues:
    keys, values = jnp.split(_cells_alone(pages), 2, axis=-1)
    return jnp.moveaxis(keys, 2, 0), jnp.moveaxis(values, 2, 0)


def _attend_cudnn(
    q_BNH: Float[Array, "B N H"],
    k_BKH: Float[Array, "B K H"],
    v_BKH: Float[Array, "B K H"],
    pages: KeysAndValues,  # [B * M, K, Z, H] each: no null page, no spare pages
    layer: int | Int32[Array, ""],
    table_BM: Int32[Array, "B M"],
    kv_len_B: Int32[Array, "B"],
    *_: Any,
    scale: float,
) -> tuple[Float[Array, "B N H"], KeysAndValues]:
    """cuDNN's paged attention on one layer's pages; in JAX it has no public name."""
    _check_decodes(q_BNH, table_BM)
    if pages[0].shape[0] != table_BM.size:
        raise NotImplementedError(
            f"cudnn needs as many pages as the table has entries, {table_BM.size}; "
            f"got {pages[0].shape[0]}. Choose a case whose rows are equally long."
        )
    cudnn, table_B1M1 = cudnn_attention(), (table_BM - 1)[:, None, :, None]
    try:
        out_BN1H = cudnn.paged_attention(
            q_BNH[:, :, None],
            *pages,
            jnp.ones_like(kv_len_B),
            kv_len_B,
            *(table_B1M1, table_B1M1),
            scale=scale,
            mask_type=cudnn.MaskType.PADDING,
            qkv_layout="BNTH",
        )
    except RuntimeError as error:
        raise NotImplementedError(
            f"cudnn must be installed; got error={error}. Do: pip install nvidia-cudnn-cu13."
        ) from error
    return out_BN1H[:, :, 0], pages


def _split_for_cudnn(pages: Pages) -> KeysAndValues:
    keys, values = jnp.split(_cells_alone(pages)[0, 1:], 2, axis=-1)
    return keys, values


def _check_decodes(q_TNH: Array, table_BM: Array) -> None:
    if q_TNH.shape[0] != table_BM.shape[0]:
        raise NotImplementedError(
            f"a baseline attends from one token per row; got {q_TNH.shape[0]} tokens of "
            f"{table_BM.shape[0]} rows. Choose a decode case."
        )


def _cells_alone(pages: Pages) -> Array:
    if isinstance(pages, QuantizedPages):
        raise NotImplementedError("a baseline needs plain pages; got 8 bits. Choose another case.")
    return pages


BASELINES = {
    "triton": Baseline(
        attend=_attend_triton,
        split=_split_for_triton,
        # The default splits the context, for few rows; many rows fill a chip without it.
        variants=({"num_parts": 16}, {"num_parts": 4}, {"num_parts": 1}),
    ),
    "cudnn": Baseline(attend=_attend_cudnn, split=_split_for_cudnn, variants=({},), most_layers=1),
}


def variants_of(name: str) -> list[Callable[..., tuple[Any, Any]]]:
    """The calls to time: a baseline's variants, or one for ours, which choose their own tiles."""
    variants = BASELINES[name].variants if name in BASELINES else ({},)
    return [partial(implementation(name), **variant) for variant in variants]
