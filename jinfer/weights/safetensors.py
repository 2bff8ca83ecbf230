"""Reads the safetensors format: a table of tensors, then their bytes, which are memory-mapped.

Every tensor is a numpy view of its file. Slicing, permuting and splitting axes cost nothing, and a
shard can be copied directly from the file. Every table entry is checked.

Source: huggingface/safetensors, README, "Format".
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jinfer.errors import CheckpointError
from jinfer.weights.folder import read_json_object
from jinfer.weights.host_tensor import Part, Piece

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
    offset: int  # bytes from the start of the file
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self) -> np.ndarray:
        """A read-only view of the tensor in the file; the mapping lives as long as the view."""
        return np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape
        )

    def pieces(self, sizes: Sequence[int], parts: Sequence[Part]) -> list[Piece]:
        """The whole part as one view; see `jinfer.weights.host_tensor.Stored`."""
        view = self.view().reshape(sizes)
        for axis, part in enumerate(parts):
            view = view[(slice(None),) * axis + (part,)]
        return [(tuple(map(slice, view.shape)), lambda: view)]


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
    header, data_start = _read_header(path)
    data_bytes = path.stat().st_size - data_start
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors, data_end = {}, 0
    for name, entry in entries.items():
        tensors[name], end = _stored_tensor(path, name, entry, data_start)
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
    return {tensor: tables[file_name][tensor] for tensor, file_name in index.items()}


def _read_shard(folder: Path, file_name: str) -> dict[str, StoredTensor]:
    # A plain file name only: an index must not refer outside its folder.
    if Path(file_name).name != file_name or not (folder / file_name).is_file():
        raise CheckpointError(
            f"{INDEX_FILE} must name files of its own folder; got {file_name!r}, "
            f"which is not in {folder}. Download the missing file."
        )
    return read_table(folder / file_name)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"its table needs {header_bytes} bytes, got {file_bytes} in all")
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):  # undecodable bytes included
        raise _damaged(path, f"its table is not JSON, got {text[:40]!r}") from None
    if not isinstance(header, dict):
        raise _damaged(path, f"its table is not a JSON object, got {text[:40]!r}")
    return header, 8 + header_bytes


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int) -> tuple[StoredTensor, int]:
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
        path=path, offset=data_start + start, dtype=DTYPES[entry["dtype"]], shape=tuple(shape)
    )
    if end - start != tensor.num_bytes:
        raise _damaged(path, f"{name} needs {tensor.num_bytes} bytes, got {end - start}")
    return tensor, end


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file: {what}. Download it again.")
