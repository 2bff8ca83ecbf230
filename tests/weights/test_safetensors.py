"""Files as the reference library writes them, and files that nobody should write."""

import json
import os
import time

import numpy as np
import pytest
from random_checkpoint import DTYPES, write_json, write_llama_checkpoint
from safetensors.numpy import save_file

from jinfer.errors import CheckpointError
from jinfer.weights.safetensors import MAX_HEADER_BYTES, open_checkpoint, read_table


def write_raw(path, header, data=b"", header_bytes=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if header_bytes is None else header_bytes
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "dtype", [*DTYPES.values(), np.float64, np.int64, np.int32, np.int8, np.uint8, np.bool_]
)
def test_reads_what_the_reference_library_writes(tmp_path, dtype) -> None:
    tensors = {
        "matrix": np.arange(6).reshape(2, 3).astype(dtype),
        "vector": np.arange(5).astype(dtype),
        "scalar": np.array(1).astype(dtype),
    }
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    table = read_table(tmp_path / "t.safetensors")
    assert set(table) == set(tensors)
    for name, want in tensors.items():
        np.testing.assert_array_equal(table[name].read().reshape(want.shape), want)
        assert table[name].dtype == want.dtype
        assert table[name].num_bytes == want.nbytes


def test_reads_tensors_that_are_not_aligned(tmp_path) -> None:
    values = np.arange(2, dtype=np.float32)
    text = json.dumps({"t": entry()}).encode()
    text += b" " * ((3 - len(text)) % 8)  # the data then start 3 bytes past a multiple of 8
    path = write_raw(tmp_path / "t.safetensors", text, values.tobytes())
    np.testing.assert_array_equal(read_table(path)["t"].read(), values)


@pytest.mark.parametrize(
    ("header", "data", "header_bytes", "message"),
    [
        ({"t": entry()}, b"\0" * 7, None, "describes 8 bytes of data, got 7"),
        ({"t": entry()}, b"\0" * 9, None, "describes 8 bytes of data, got 9"),
        ({"t": entry()}, b"\0" * 8, 10_000, "table needs 10000 bytes, got 7. in all"),
        (b"{", b"\0" * MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, "table needs 100000001 bytes"),
        (b"\xff\xfe{", b"", None, "table is not JSON"),
        (b'{"t": ', b"", None, "table is not JSON"),
        (b"[1, 2]", b"", None, "not a JSON object"),
        ({"t": entry(shape=(3,))}, b"\0" * 8, None, "t needs 12 bytes, got 8"),
        ({"t": entry(offsets=(8, 0))}, b"\0" * 8, None, "t needs 8 bytes, got -8"),
        ({"t": entry(shape=(-2,))}, b"\0" * 8, None, "its entry for t is"),
        ({"t": entry(shape=("2",))}, b"\0" * 8, None, "its entry for t is"),
        ({"t": entry(offsets=(0, 4, 8))}, b"\0" * 8, None, "its entry for t is"),
        ({"t": {"dtype": "F32"}}, b"\0" * 8, None, "its entry for t is"),
        ({"t": [1]}, b"\0" * 8, None, "its entry for t is"),
    ],
)
def test_damaged_file(tmp_path, header, data, header_bytes, message) -> None:
    path = write_raw(tmp_path / "t.safetensors", header, data, header_bytes)
    with pytest.raises(CheckpointError, match=f"t.safetensors is not a whole .*{message}.*again"):
        read_table(path)


def test_nonsense_in_the_table_is_named(tmp_path) -> None:
    for header, message in (
        ({"t": {**entry(), "dtype": []}}, r"got dtype=\[\] for t"),
        (b"[" * 100_000, "its table is not JSON"),
    ):
        path = write_raw(tmp_path / "t.safetensors", header, b"\0" * 8)
        with pytest.raises(CheckpointError, match=message):
            read_table(path)


def test_file_shorter_than_its_length_field(tmp_path) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"\1\0\0")
    with pytest.raises(CheckpointError, match="table needs 1 bytes, got 3 in all"):
        read_table(tmp_path / "t.safetensors")


def test_unknown_dtype_is_named(tmp_path) -> None:
    path = write_raw(tmp_path / "t.safetensors", {"t": entry(dtype="F4")}, b"\0" * 8)
    with pytest.raises(CheckpointError, match="got dtype='F4' for t"):
        read_table(path)


def test_every_truncation_of_a_file_is_noticed(tmp_path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float16)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
            read_table(path)


def sharded(tmp_path):
    folder = write_llama_checkpoint(tmp_path, seed=0, shards=2)
    return folder, json.loads((folder / "model.safetensors.index.json").read_text())


def test_absent_shard_is_named(tmp_path) -> None:
    folder, _ = sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="own folder; got 'model-00002-of-00002.safetensors'"):
        open_checkpoint(folder)


def test_index_must_not_reach_outside_its_folder(tmp_path) -> None:
    folder, index = sharded(tmp_path / "model")
    outside = write_llama_checkpoint(tmp_path / "other", seed=0) / "model.safetensors"
    assert outside.is_file()
    index["weight_map"]["model.norm.weight"] = "../other/model.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=r"own folder; got '\.\./other/model\.safetensors'"):
        open_checkpoint(folder)


def test_tensor_that_its_shard_lacks_is_named(tmp_path) -> None:
    folder, index = sharded(tmp_path)
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match="file lacks; got 'model.extra.weight' in .*00001-of"):
        open_checkpoint(folder)


def test_a_tensor_that_the_index_leaves_out_is_seen(tmp_path) -> None:
    folder, index = sharded(tmp_path)
    want = open_checkpoint(folder)
    del index["weight_map"]["lm_head.weight"]
    write_json(folder / "model.safetensors.index.json", index)
    assert open_checkpoint(folder) == want


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 1}])
def test_index_without_a_map(tmp_path, weight_map) -> None:
    folder, _ = sharded(tmp_path)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match="must map tensors to files; got weight_map="):
        open_checkpoint(folder)


def test_broken_index(tmp_path) -> None:
    folder, _ = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="index.json is not JSON"):
        open_checkpoint(folder)


def test_folder_without_safetensors(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="must hold model.safetensors or .*Save the model as"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="which holds pytorch_model.bin"):
        open_checkpoint(tmp_path)


# --- files that change ---


def _shrink(path):
    os.truncate(path, path.stat().st_size - 8)


def _replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def _write(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


CHANGES = [
    (_shrink, "which (became shorter|was written or replaced)"),
    (lambda path: os.truncate(path, 0), "which became shorter"),
    (_replace, "which was written or replaced"),
    (_write, "which was written or replaced"),
    (lambda path: path.unlink(), "which cannot be read: No such file"),
]


@pytest.mark.parametrize("columns", [slice(0, 6), slice(2, 4)])
@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_file_that_changes_behind_its_table_is_refused(tmp_path, change, said, columns) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": np.arange(24, dtype=np.float32).reshape(4, 6)}, path)
    ((_, read),) = read_table(path)["t"].pieces((4, 6), (slice(1, 4), columns))
    time.sleep(0.02)  # the clock of file times is coarse
    change(path)
    with pytest.raises(CheckpointError, match=f"must not change while .*; got .*{said}.* again wh"):
        read()


@pytest.mark.parametrize("piece_bytes", [1, 40, 10_000])
@pytest.mark.parametrize("rows", [slice(0, 5), slice(1, 4), slice(2, 2), np.array([1, 1, 3])])
@pytest.mark.parametrize("columns", [slice(0, 6), slice(2, 5), np.array([4, 0, 0])])
def test_pieces_fill_a_part(tmp_path, monkeypatch, piece_bytes, rows, columns) -> None:
    monkeypatch.setattr("jinfer.weights.safetensors.PIECE_BYTES", piece_bytes)
    whole = np.arange(30, dtype=np.float32).reshape(5, 6)
    save_file({"a": np.ones(3, np.float32), "t": whole}, tmp_path / "t")
    want = whole[rows][:, columns]
    got = np.full(want.shape, np.nan, np.float32)
    for where, read in read_table(tmp_path / "t")["t"].pieces((5, 6), (rows, columns)):
        assert np.isnan(got[where]).all()
        got[where] = read()
    np.testing.assert_array_equal(got, want)


def test_a_file_that_vanishes_before_its_table_is_read(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="absent cannot be read: No such file .*Check the"):
        read_table(tmp_path / "absent")
