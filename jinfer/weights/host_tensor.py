"""Describes one stored parameter, and copies it: permuted, converted, padded."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jinfer.errors import CheckpointError

TILE_BYTES = 128 * 1024  # of a file per copy, so that the permuted writes stay in the core's cache
PARALLEL_BYTES = 4 * 1024 * 1024  # from this size on, several threads copy one tensor
MAX_THREADS = 16
DEVICE_ALIGNMENT = 64  # bytes; XLA on CPU then uses a numpy buffer without a copy

Part = slice | np.ndarray  # of an axis: a range, or a list of indices
# The index of a piece within a part of a tensor, and the function that reads the piece.
Piece = tuple[tuple[slice, ...], Callable[[], np.ndarray]]


class Stored(Protocol):
    """Describes one tensor of a checkpoint, in any file format."""

    @property
    def path(self) -> Path: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_bytes(self) -> int: ...

    def pieces(self, sizes: Sequence[int], parts: Sequence[Part]) -> Sequence[Piece]:
        """Splits a part of the tensor into pieces that can be read one at a time.

        Args:
          sizes: sizes of the axes that `parts` refers to: the tensor's own, or split ones.
          parts: one per axis of `sizes`.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTensor:
    """Describes one parameter. Nothing is read before `read` is called.

    It may be larger than the stored one (`jinfer.parallel.model_shards`): the vocabulary is padded
    with rows of zeros, and kv heads are repeated.
    """

    axes: str  # one letter per axis, with a leading L if stacked
    shape: tuple[int, ...]  # padded
    stored_shape: tuple[int, ...]  # same axes, not padded
    head_dim: int  # H
    dtype: np.dtype  # wanted; the stored one may differ
    layers: tuple[Stored, ...]  # one, or one per layer if stacked
    stored_axes: str  # letters of one layer, in the order of the file

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Copies one shard from the files: permuted, converted, padded and repeated.

        Args:
          index: a slice per axis, as in a sharding's index map; None = all.

        Raises:
          CheckpointError: if a value overflows the wanted dtype.
        """
        index = index or (slice(None),) * len(self.shape)
        target = _room_for(index, self.shape, self.dtype)
        self.read_into(target, index)
        return target

    def read_into(self, target: np.ndarray, index: tuple[slice, ...]) -> None:
        """Does the same as `read`, into existing memory."""
        if self.axes.startswith("L"):
            for layer, tensor in enumerate(self.layers[index[0]]):
                self._copy(tensor, index[1:], target[layer])
        else:
            self._copy(self.layers[0], index, target)

    def _copy(self, tensor: Stored, index: tuple[slice, ...], target: np.ndarray) -> None:
        axes = self.axes.removeprefix("L")
        size_of = dict(zip(self.axes, self.stored_shape, strict=True))
        order = [axes.index(letter) for letter in self.stored_axes]
        target = target.transpose(order)  # a view with the axes in stored order
        parts = [self._stored(letter, index[axes.index(letter)]) for letter in self.stored_axes]
        if any(map(_is_longer, target.shape, parts)):  # the padding of the vocabulary
            target[...] = 0
        sizes = [size_of[letter] for letter in self.stored_axes]

        def copy(piece: Piece) -> None:
            where, read = piece
            copy_converted(read(), target[where])

        try:
            _in_threads(copy, tensor.pieces(sizes, parts))
        except FloatingPointError:
            raise CheckpointError(
                f"stored values must fit the requested dtype; got dtype={self.dtype} and larger "
                f"values in {tensor.path}. Ask for bfloat16 or float32."
            ) from None

    def _stored(self, letter: str, part: slice) -> Part:
        """The entries of the stored axis that make up a part of the padded axis."""
        axis = self.axes.index(letter)
        padded, stored = self.shape[axis], self.stored_shape[axis]
        start, stop, _ = part.indices(padded)
        if padded == stored:
            return slice(start, stop)
        if letter == "V":
            return slice(min(start, stored), min(stop, stored))
        index = repeated(np.arange(start, stop), letter, padded // stored, self.head_dim)
        first, last = int(index[0]), int(index[-1])
        return slice(first, last + 1) if last - first == stop - start - 1 else index


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedTensor:
    """One fused parameter: several stored ones, concatenated along one axis.

    Shard n of it is the concatenation of shard n of each part.
    """

    axes: str  # one letter per axis, with a leading L if stacked; then the concatenated axis
    shape: tuple[int, ...]  # padded
    parts: tuple[HostTensor, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Copies one shard from the files, as `HostTensor.read` does.

        Args:
          index: a slice per axis; on the concatenated axis, one of its equal shards; None = all.
        """
        index = index or (slice(None),) * len(self.shape)
        axis = len(self.axes) - len(self.axes.removeprefix("L"))
        padded = self.shape[axis]
        start, stop, _ = index[axis].indices(padded)
        assert padded % (stop - start) == 0 == start % (stop - start), (
            f"not one of equal shards: {start=}, {stop=}, {padded=}"
        )
        num_shards, number = padded // (stop - start), start // (stop - start)
        assert all(part.shape[axis] % num_shards == 0 for part in self.parts), f"{num_shards=}"
        lengths = [part.shape[axis] // num_shards for part in self.parts]
        target = _room_for(index, self.shape, self.dtype)
        rooms = np.split(target, np.cumsum(lengths)[:-1], axis=axis)
        for part, room, length in zip(self.parts, rooms, lengths, strict=True):
            own = slice(number * length, (number + 1) * length)
            part.read_into(room, (*index[:axis], own, *index[axis + 1 :]))
        return target


def repeated(index: Any, letter: str, num_repeats: int, head_dim: int) -> Any:
    """Maps indices of a repeated kv-head axis, K or C, to indices of the stored axis."""
    width = head_dim if letter == "C" else 1
    return index // width // num_repeats * width + index % width


def _is_longer(length: int, part: Part) -> bool:
    return length > (part.stop - part.start if isinstance(part, slice) else len(part))


def copy_converted(source: np.ndarray, target: np.ndarray) -> None:
    """Writes `source` into `target`, converting the dtype.

    The source is read in file order, tile by tile; several threads copy a large one.

    Raises:
      FloatingPointError: if a value overflows a float16 target.
    """
    longest = int(np.argmax(source.strides))  # outermost axis in the file
    source, target = np.moveaxis(source, longest, 0), np.moveaxis(target, longest, 0)
    num_rows = source.shape[0]
    tile_rows = max(1, TILE_BYTES * num_rows // max(1, source.nbytes))
    starts = range(0, num_rows, tile_rows)

    def copy(tiles: Iterable[int]) -> None:
        for start in tiles:
            rows = slice(start, start + tile_rows)
            target[rows] = _converted(source[rows], target.dtype)

    num_threads = 1 if source.nbytes < PARALLEL_BYTES else _most_threads()
    # Interleaved, so that the threads move through the file together.
    _in_threads(copy, [starts[thread::num_threads] for thread in range(num_threads)])


def _in_threads(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    num_threads = min(_most_threads(), len(items))
    if num_threads < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, items))


def _most_threads() -> int:
    return min(MAX_THREADS, os.cpu_count() or 1)


def _converted(tile: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tile in another dtype, contiguous in file order."""
    if tile.dtype == dtype:
        return tile
    with np.errstate(over="raise"):
        if dtype == np.float16:  # through float32: its conversion to float16 detects overflow
            return tile.astype(np.float32).astype(dtype)
        return tile.astype(dtype)


def _room_for(index: tuple[slice, ...], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocates memory for the part of an array that `index` selects."""
    return _aligned_empty([len(range(n)[i]) for n, i in zip(shape, index, strict=True)], dtype)


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(num_bytes + DEVICE_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % DEVICE_ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
