"""Reads the safetensors format: a table of tensors, then their bytes.

A shard is read in blocks of rows, without the rest of its tensor. Every table entry is checked. So
is the file after every block, which must still be the one whose table was read. Whole rows are
not memory-mapped: if a mapped file shrinks, the process ends with SIGBUS.

Source: huggingface/safetensors, README, "Format".
"""

import json
import math
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jinfer.errors import CheckpointError
from jinfer.weights.folder import FileState, changed, read_json_object, state_of
from jinfer.weights.host_tensor import Part, Piece

# Read at once, by each thread. With less, threads wait for each other's Python: at 256 KiB twice
# the processor time. Below PARALLEL_BYTES of host_tensor.py.
PIECE_BYTES = 4_000_000
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a file: its place, dtype and shape."""

    path: Path
    state: FileState  # of the file when its table was read
    offset: int  # bytes from the start of the file
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Copies the whole tensor; raises as `pieces` does."""
        num_values = math.prod(self.shape)
        return self._read([num_values], [slice(0, num_values)]).reshape(self.shape).copy()

    def pieces(self, sizes: Sequence[int], parts: Sequence[Part]) -> list[Piece]:
        """Splits the part into blocks of rows; see `jinfer.weights.host_tensor.Stored`.

        A piece is valid until its thread reads the next one. Reading one raises CheckpointError if
        the file has changed since its table was read.
        """
        rows = parts[0]
        if not isinstance(rows, slice):  # repeated kv heads, several on one device: a small matrix
            return [((), partial(self._read, sizes, parts))]
        row_bytes = math.prod(map(len, map(_span, parts[1:]))) * self.dtype.itemsize
        num_rows = max(1, PIECE_BYTES // max(1, row_bytes))
        starts = range(rows.start, rows.stop, num_rows)
        blocks = [slice(start, min(start + num_rows, rows.stop)) for start in starts]
        return [
            (
                (slice(block.start - rows.start, block.stop - rows.start),),
                partial(self._read, sizes, (block, *parts[1:])),
            )
            for block in blocks
        ]

    def _read(self, sizes: Sequence[int], parts: Sequence[Part]) -> np.ndarray:
        rows = _span(parts[0])
        is_narrow = any(
            _span(part) != range(n) for part, n in zip(parts[1:], sizes[1:], strict=True)
        )
        try:
            with self.path.open("rb", buffering=0) as file:
                read = self._mapped if is_narrow else self._copied
                block = read(file, rows, sizes)
                for axis, part in enumerate((_shifted(parts[0], -rows.start), *parts[1:])):
                    block = block[(slice(None),) * axis + (part,)]
                block = np.ascontiguousarray(block)  # now read, whatever happens to the file next
                if state_of(os.fstat(file.fileno())) != self.state:
                    raise changed(self.path, "was written or replaced")
        except OSError as error:
            raise changed(self.path, f"cannot be read: {error.strerror}") from None
        return block

    def _copied(self, file: FileIO, rows: range, sizes: Sequence[int]) -> np.ndarray:
        row_bytes = math.prod(sizes[1:]) * self.dtype.itemsize
        room = _room(len(rows) * row_bytes)
        file.seek(self.offset + rows.start * row_bytes)
        left: Any = memoryview(room)  # type: ignore[arg-type]
        while left:
            num_read = file.readinto(left)
            if not num_read:
                raise changed(self.path, "became shorter")
            left = left[num_read:]
        return room.view(self.dtype).reshape(len(rows), *sizes[1:])

    def _mapped(self, file: FileIO, rows: range, sizes: Sequence[int]) -> np.ndarray:
        """A view that costs no reading of the columns that are not used."""
        if os.fstat(file.fileno()).st_size < self.offset + self.num_bytes:
            raise changed(self.path, "became shorter")
        where = {"offset": self.offset, "shape": tuple(sizes)}
        return np.memmap(file, self.dtype, "r", **where)[rows.start : rows.stop]


_of_thread = threading.local()


def _room(num_bytes: int) -> np.ndarray:
    """Memory for one piece, which the thread's next piece overwrites.

    Mapped, since an allocator would keep several freed pieces of each thread.
    """
    room: np.ndarray | None = getattr(_of_thread, "room", None)
    if room is None or len(room) < num_bytes:
        room = _of_thread.room = np.frombuffer(mmap.mmap(-1, max(1, num_bytes)), np.uint8)
    return room[:num_bytes]


def is_safetensors(folder: Path) -> bool:
    """Whether a model folder has safetensors, in one file or in several."""
    return any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of all files in its index.

    Raises:
      CheckpointError: if there are no safetensors, or a file is missing, truncated or damaged.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_table(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return _read_sharded(folder)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    found = f", which holds {', '.join(pickles[:3])}" if pickles else ""
    raise CheckpointError(
        f"a model folder must hold {SINGLE_FILE} or {INDEX_FILE}; got {str(folder)!r}{found}. "
        "Save the model as safetensors."
    )


def read_table(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; every entry is checked against the file's length."""
    header, data_start, state = _read_header(path)
    data_bytes = state[1] - data_start
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors, data_end = {}, 0
    for name, entry in entries.items():
        tensors[name], end = _stored_tensor(path, state, name, entry, data_start)
        data_end = max(data_end, end)
    if data_end != data_bytes:
        raise _damaged(path, f"its table describes {data_end} bytes of data, got {data_bytes}")
    return tensors


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    index = read_json_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(
            f"{INDEX_FILE} must map tensors to files; got weight_map={index!r:.80} in {folder}. "
            "Download it again."
        )
    tables = {name: _read_shard(folder, name) for name in sorted(set(index.values()))}
    for tensor, file_name in index.items():
        if tensor not in tables[file_name]:
            raise CheckpointError(
                f"{INDEX_FILE} names a tensor that its file lacks; got {tensor!r} in "
                f"{folder / file_name}. Download both again."
            )
    # Tensors that the index leaves out count too, as in transformers: the caller must see them.
    found = {tensor: one for table in tables.values() for tensor, one in table.items()}
    return found | {tensor: tables[file_name][tensor] for tensor, file_name in index.items()}


def _read_shard(folder: Path, file_name: str) -> dict[str, StoredTensor]:
    # A plain file name only: an index must not refer outside its folder.
    if Path(file_name).name != file_name or not (folder / file_name).is_file():
        raise CheckpointError(
            f"{INDEX_FILE} must name files of its own folder; got {file_name!r}, "
            f"which is not in {folder}. Download the missing file."
        )
    return read_table(folder / file_name)


def _read_header(path: Path) -> tuple[dict[str, Any], int, FileState]:
    try:
        with path.open("rb") as file:
            state = state_of(os.fstat(file.fileno()))
            file_bytes, header_bytes = state[1], int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                what = f"its table needs {header_bytes} bytes, got {file_bytes} in all"
                raise _damaged(path, what)
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the file.") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):  # undecodable bytes included
        raise _damaged(path, f"its table is not JSON, got {text[:40]!r}") from None
    if not isinstance(header, dict):
        raise _damaged(path, f"its table is not a JSON object, got {text[:40]!r}")
    return header, 8 + header_bytes, state


def _stored_tensor(
    path: Path, state: FileState, name: str, entry: Any, data_start: int
) -> tuple[StoredTensor, int]:
    """The tensor of one table entry, and the end offset of its bytes in the data."""
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(path, f"its entry for {name} is {entry!r:.80}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"a tensor's dtype must be one of {', '.join(DTYPES)}; "
            f"got dtype={entry['dtype']!r} for {name} in {path}. Use another checkpoint."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"its entry for {name} is {entry!r:.80}")
    start, end = offsets
    tensor = StoredTensor(
        path=path,
        state=state,
        offset=data_start + start,
        dtype=DTYPES[entry["dtype"]],
        shape=tuple(shape),
    )
    if end - start != tensor.num_bytes:
        raise _damaged(path, f"{name} needs {tensor.num_bytes} bytes, got {end - start}")
    return tensor, end


def _span(part: Part) -> range:
    """The smallest range that contains a part of an axis."""
    if isinstance(part, slice):
        return range(part.start, part.stop)
    return range(int(part.min()), int(part.max()) + 1)


def _shifted(part: Part, by: int) -> Part:
    return slice(part.start + by, part.stop + by) if isinstance(part, slice) else part + by


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file: {what}. Download it again.")
