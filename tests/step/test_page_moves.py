"""Whole pages move within the pool, out of it and back, whatever the pool is made of."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jinfer.step.page_moves import PAGES_PER_MOVE, copy_pages, gather_pages, scatter_pages


class Cells(NamedTuple):
    cells: Any
    scales: Any


def pool_of(kind: str) -> Any:
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(2, 12, 3, 4, 10)).astype(np.float32)
    if kind == "array":
        return cells
    return Cells((cells * 10).astype(np.int8), rng.normal(size=(2, 12, 3, 2, 4)))


def padded(*page_ids: int) -> np.ndarray:
    return np.array([*page_ids, *[0] * (PAGES_PER_MOVE - len(page_ids))], np.int32)


@pytest.mark.parametrize("kind", ["array", "tuple"])
def test_copies_follow_each_other(kind: str) -> None:
    pool = pool_of(kind)
    copied = jax.jit(copy_pages)(pool, padded(3, 5, 7), padded(7, 1, 9))
    for before, after in zip(jax.tree.leaves(pool), jax.tree.leaves(copied), strict=True):
        want = np.array(before, np.asarray(after).dtype)
        for source, page in ((3, 7), (5, 1), (7, 9)):
            want[:, page] = want[:, source]
        np.testing.assert_array_equal(after, want)


@pytest.mark.parametrize("kind", ["array", "tuple"])
def test_what_is_taken_out_comes_back(kind: str) -> None:
    pool = pool_of(kind)
    contents = jax.jit(gather_pages)(pool, padded(3, 11))
    assert len(contents) == PAGES_PER_MOVE
    moved = jax.jit(scatter_pages)(pool, padded(5, 2), contents)
    for before, after in zip(jax.tree.leaves(pool), jax.tree.leaves(moved), strict=True):
        want = np.array(before, np.asarray(after).dtype)
        want[:, 5], want[:, 2] = want[:, 3], want[:, 11]
        np.testing.assert_array_equal(np.asarray(after)[:, 1:], want[:, 1:])  # but for the bin
