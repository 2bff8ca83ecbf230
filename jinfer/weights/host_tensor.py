"""One parameter as it lies in the files, and the copy that permutes and converts it."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jinfer.errors import CheckpointError
from jinfer.weights.safetensors import StoredTensor

TILE_BYTES = 128 * 1024  # of a file per copy: the permuted writes then stay in the core's cache
PARALLEL_BYTES = 4 * 1024 * 1024  # from here on, several threads copy one tensor
MAX_THREADS = 16
DEVICE_ALIGNMENT = 64  # bytes; XLA on CPU then takes a numpy buffer as it is


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTensor:
    """One parameter, described. Nothing is read before `read` is called."""

    axes: str  # one letter per axis, with a leading L if stacked
    shape: tuple[int, ...]
    dtype: np.dtype  # wanted; the stored one may differ
    layers: tuple[StoredTensor, ...]  # one, or one per layer if stacked
    stored_axes: str  # one layer's letters in the order of the file

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Copies one shard out of the files, permuted and converted.

        Args:
          index: a slice per axis, as `jax.make_array_from_callback` asks for it; None = all.

        Raises:
          CheckpointError: if a value overflows the wanted dtype.
        """
        index = index or (slice(None),) * len(self.shape)
        lengths = [len(range(size)[part]) for size, part in zip(self.shape, index, strict=True)]
        target = _aligned_empty(lengths, self.dtype)
        if self.axes.startswith("L"):
            for layer, tensor in enumerate(self.layers[index[0]]):
                self._copy(tensor, index[1:], target[layer])
        else:
            self._copy(self.layers[0], index, target)
        return target

    def _copy(self, tensor: StoredTensor, index: tuple[slice, ...], target: np.ndarray) -> None:
        axes = self.axes.removeprefix("L")
        size_of = dict(zip(self.axes, self.shape, strict=True))
        split = tensor.view().reshape([size_of[letter] for letter in self.stored_axes])
        source = split.transpose([self.stored_axes.index(letter) for letter in axes])
        try:
            copy_converted(source[index], target)
        except FloatingPointError:
            raise CheckpointError(
                f"stored values must fit the dtype asked for; got dtype={self.dtype} and larger "
                f"values in {tensor.path}. Ask for bfloat16 or float32."
            ) from None


def copy_converted(source: np.ndarray, target: np.ndarray) -> None:
    """Writes `source` into `target`, converting the dtype.

    The source is read in the order of its file, a tile at a time, and in parallel when large.

    Raises:
      FloatingPointError: if a value overflows a float16 target.
    """
    longest = int(np.argmax(source.strides))  # its neighbours lie farthest apart in the file
    source, target = np.moveaxis(source, longest, 0), np.moveaxis(target, longest, 0)
    num_rows = source.shape[0]
    tile_rows = max(1, TILE_BYTES * num_rows // max(1, source.nbytes))
    starts = range(0, num_rows, tile_rows)

    def copy(tiles: Iterable[int]) -> None:
        for start in tiles:
            rows = slice(start, start + tile_rows)
            target[rows] = _converted(source[rows], target.dtype)

    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    if source.nbytes < PARALLEL_BYTES or num_threads == 1:
        copy(starts)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        # Interleaved, so that the threads move through the file together.
        list(pool.map(copy, [starts[thread::num_threads] for thread in range(num_threads)]))


def _converted(tile: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tile in another dtype, contiguous in the order of the file."""
    if tile.dtype == dtype:
        return tile
    with np.errstate(over="raise"):
        if dtype == np.float16:  # by way of float32, whose conversion notices overflow
            return tile.astype(np.float32).astype(dtype)
        return tile.astype(dtype)


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(num_bytes + DEVICE_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % DEVICE_ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
