"""One parameter as it lies in the files, and the copy that permutes and converts it."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jinfer.errors import CheckpointError

TILE_BYTES = 128 * 1024  # of a file per copy: the permuted writes then stay in the core's cache
PARALLEL_BYTES = 4 * 1024 * 1024  # from here on, several threads copy one tensor
MAX_THREADS = 16
DEVICE_ALIGNMENT = 64  # bytes; XLA on CPU then takes a numpy buffer as it is

Part = slice | np.ndarray  # of an axis: from start to stop, or entry by entry
# Where a piece of a part of a tensor stands within that part, and how to read it.
Piece = tuple[tuple[slice, ...], Callable[[], np.ndarray]]


class Stored(Protocol):
    """One tensor of a checkpoint, described, whatever the format of the files."""

    @property
    def path(self) -> Path: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_bytes(self) -> int: ...

    def pieces(self, sizes: Sequence[int], parts: Sequence[Part]) -> Sequence[Piece]:
        """Cuts a part of the tensor into pieces that need not all be in memory at once.

        Args:
          sizes: of the axes that `parts` speaks of: the tensor's own, or these split.
          parts: of each of these axes.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTensor:
    """One parameter, described. Nothing is read before `read` is called.

    It may be larger than it is stored (`jinfer.parallel.model_shards`): rows of the vocabulary are
    padded with zeros, kv heads repeated side by side.
    """

    axes: str  # one letter per axis, with a leading L if stacked
    shape: tuple[int, ...]  # as it is held
    stored_shape: tuple[int, ...]  # the same axes as they are stored
    head_dim: int  # H
    dtype: np.dtype  # wanted; the stored one may differ
    layers: tuple[Stored, ...]  # one, or one per layer if stacked
    stored_axes: str  # one layer's letters in the order of the file

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Copies one shard out of the files, permuted, converted, filled up and repeated.

        Args:
          index: a slice per axis, as a sharding's index map has it; None = all.

        Raises:
          CheckpointError: if a value overflows the wanted dtype.
        """
        index = index or (slice(None),) * len(self.shape)
        target = _room_for(index, self.shape, self.dtype)
        self.read_into(target, index)
        return target

    def read_into(self, target: np.ndarray, index: tuple[slice, ...]) -> None:
        """The same as `read`, into memory that is there."""
        if self.axes.startswith("L"):
            for layer, tensor in enumerate(self.layers[index[0]]):
                self._copy(tensor, index[1:], target[layer])
        else:
            self._copy(self.layers[0], index, target)

    def _copy(self, tensor: Stored, index: tuple[slice, ...], target: np.ndarray) -> None:
        axes = self.axes.removeprefix("L")
        size_of = dict(zip(self.axes, self.stored_shape, strict=True))
        order = [axes.index(letter) for letter in self.stored_axes]
        target = target.transpose(order)  # a view, its axes as they are stored
        parts = [self._stored(letter, index[axes.index(letter)]) for letter in self.stored_axes]
        if any(map(_is_longer, target.shape, parts)):  # the rest of the vocabulary
            target[...] = 0
        sizes = [size_of[letter] for letter in self.stored_axes]

        def copy(piece: Piece) -> None:
            where, read = piece
            copy_converted(read(), target[where])

        try:
            _in_threads(copy, tensor.pieces(sizes, parts))
        except FloatingPointError:
            raise CheckpointError(
                f"stored values must fit the dtype asked for; got dtype={self.dtype} and larger "
                f"values in {tensor.path}. Ask for bfloat16 or float32."
            ) from None

    def _stored(self, letter: str, part: slice) -> Part:
        """Which entries of a stored axis a part of the held one consists of."""
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
    """One parameter that several stored ones make up, one after the other along one axis.

    The n-th of a number of equal shards consists of the n-th shards of its parts.
    """

    axes: str  # one letter per axis, with a leading L if stacked; behind it, that of joining
    shape: tuple[int, ...]  # as it is held
    parts: tuple[HostTensor, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Copies one shard out of the files: `HostTensor.read`.

        Args:
          index: a slice per axis, of the joined one that of one of its equal shards; None = all.
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
    """Where an entry of a repeated axis of kv heads, K or C, stands on the axis as stored."""
    width = head_dim if letter == "C" else 1
    return index // width // num_repeats * width + index % width


def _is_longer(length: int, part: Part) -> bool:
    return length > (part.stop - part.start if isinstance(part, slice) else len(part))


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
    """The tile in another dtype, contiguous in the order of the file."""
    if tile.dtype == dtype:
        return tile
    with np.errstate(over="raise"):
        if dtype == np.float16:  # by way of float32, whose conversion notices overflow
            return tile.astype(np.float32).astype(dtype)
        return tile.astype(dtype)


def _room_for(index: tuple[slice, ...], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory for the part of an array that an index picks."""
    return _aligned_empty([len(range(n)[i]) for n, i in zip(shape, index, strict=True)], dtype)


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(num_bytes + DEVICE_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % DEVICE_ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
