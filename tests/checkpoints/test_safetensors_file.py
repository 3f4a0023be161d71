"""Every damage to a safetensors file is refused before a tensor is touched; a sound file is read
without a copy.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints.errors import (
    CheckpointError,
    CheckpointNotFound,
    InvalidCheckpoint,
    UnsupportedCheckpoint,
)
from checkpoints.safetensors_file import SafetensorsFile
from tests.open_files import open_files

pytestmark = pytest.mark.row(27)


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> str:
    """A file of any header; `length` lies about the header's."""
    prefix = (len(header) if length is None else length).to_bytes(8, "little")
    path.write_bytes(prefix + header + data)
    return str(path)


def write_entries(path: Path, entries: dict[str, Any], data: bytes) -> str:
    return write_raw(path, json.dumps(entries).encode(), data)


def entry(
    begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None
) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def refusal(path: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    return caught.value


def test_tensors_read_equal_those_written_by_the_library(tmp_path: Path) -> None:
    written = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f16": np.arange(5, dtype=np.float16),
        "bf16": np.arange(4).astype(ml_dtypes.bfloat16).reshape(1, 4),
        "i64": np.array([-(2**60), 7]),
        "u8": np.array([0, 255], np.uint8),
        "bool": np.array([True, False]),
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    save_file(written, tmp_path / "x.safetensors", metadata={"format": "np"})
    with SafetensorsFile(str(tmp_path / "x.safetensors")) as file:
        assert set(file.names) == set(written)
        for name, array in written.items():
            for found in (file.read(name), file.read_copy(name)):
                assert found.dtype == array.dtype == file.dtype(name)
                assert found.shape == array.shape == file.shape(name)
                assert found.tobytes() == array.tobytes()
                assert file.num_bytes(name) == array.nbytes
        with pytest.raises(InvalidCheckpoint, match="holds no tensor 'other'"):
            file.read("other")


def test_read_is_a_view_that_outlives_the_file_and_read_copy_is_owned(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.float32)
    save_file({"x": array}, tmp_path / "x.safetensors")
    with SafetensorsFile(str(tmp_path / "x.safetensors")) as file:
        view, copy = file.read("x"), file.read_copy("x")
        assert np.shares_memory(view, file.read("x"))
    assert not view.flags.writeable and not view.flags.owndata
    assert copy.flags.writeable and copy.flags.owndata
    np.testing.assert_array_equal(view, array)
    np.testing.assert_array_equal(copy, array)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    before = open_files()
    with SafetensorsFile(str(tmp_path / "x.safetensors")) as file:
        view = file.read("x")
    del view
    refusal(write_raw(tmp_path / "bad.safetensors", b"{}", length=99))
    assert open_files() <= before


@pytest.mark.parametrize(
    ("header", "length"),
    [(b"", 0), (b"{}", 2**63), (b"{}", 2**64 - 1), (b"{}", 3), (b"{}", 1), (b"{}", 100_000_001)],
)
def test_header_length_beyond_the_file_or_the_limit_is_refused(
    header: bytes, length: int, tmp_path: Path
) -> None:
    error = refusal(write_raw(tmp_path / "x", header, length=length))
    assert f"header length is {length}" in str(error)


@pytest.mark.row(25)
@pytest.mark.parametrize("contents", [b"", b"1234567"])
def test_file_shorter_than_its_prefix_is_refused(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(contents)
    assert f"is {len(contents)} bytes" in str(refusal(str(tmp_path / "x")))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "must hold a JSON object"),
        (b"{,}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"x":' + b"[" * 100_000, "nested too deeply"),
        (b'{"x":1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
        (b'{"__metadata__": 1}', "__metadata__"),
    ],
)
def test_header_that_is_no_table_of_tensors_is_refused(
    header: bytes, message: str, tmp_path: Path
) -> None:
    assert message in str(refusal(write_raw(tmp_path / "x", header)))


def test_duplicate_tensor_is_refused_by_name(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 4))
    error = refusal(write_raw(tmp_path / "x", f'{{"a": {one}, "a": {one}}}'.encode(), b"1234"))
    assert isinstance(error, InvalidCheckpoint) and error.field == "a"
    assert "'a' occurs twice" in str(error)


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "overlaps"),
        ({"a": entry(0, 4), "b": entry(5, 8)}, 8, "hole"),
        ({"a": entry(1, 4)}, 4, "hole"),
        ({"a": entry(0, 4)}, 3, "truncated"),
        ({"a": entry(0, 4)}, 5, "bytes added"),
        ({}, 1, "bytes added"),
        ({"a": entry(0, 4, "F32", [2])}, 4, "takes 8 bytes"),
        ({"a": entry(0, 4, "F32", [2**62, 2**62, 2**62])}, 4, "bytes, data_offsets give 4"),
        ({"a": entry(0, 4, "U8", [-4])}, 4, "shape is"),
        ({"a": entry(0, 4, "U8", [4.0])}, 4, "shape is"),
        ({"a": entry(0, 4, "U8", [True, 4])}, 4, "shape is"),
        ({"a": entry(0, 4, "U8", [1] * 9)}, 4, "shape is"),
        ({"a": entry(0, 4, "U8", [2**64])}, 4, "shape is"),
        ({"a": entry(0, 4) | {"data_offsets": [4, 0]}}, 4, "data_offsets is"),
        ({"a": entry(0, 4) | {"data_offsets": [-1, 3]}}, 4, "data_offsets is"),
        ({"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, 4, "data_offsets is"),
        ({"a": entry(0, 4) | {"more": 1}}, 4, "exactly dtype"),
        ({"a": {"dtype": "U8"}}, 4, "exactly dtype"),
        ({"a": [1]}, 4, "exactly dtype"),
    ],
)
def test_entries_that_do_not_tile_the_data_are_refused(
    entries: dict[str, Any], size: int, message: str, tmp_path: Path
) -> None:
    error = refusal(write_entries(tmp_path / "x", entries, bytes(size)))
    assert isinstance(error, InvalidCheckpoint) and message in str(error)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "f32", "C64", "", None, 7, ["F32"]])
def test_unknown_dtype_is_refused_with_the_known_ones(dtype: object, tmp_path: Path) -> None:
    error = refusal(write_entries(tmp_path / "x", {"a": entry(0, 4) | {"dtype": dtype}}, bytes(4)))
    assert isinstance(error, UnsupportedCheckpoint) and error.field == "a"
    assert "BF16" in str(error)


def test_too_many_tensors_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 0))
    header = ("{" + ",".join(f'"{n}":{one}' for n in range(150_000)) + "}").encode()
    path = write_raw(tmp_path / "x", header)
    tracemalloc.start()
    error = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "more than 100000 tensors" in str(error)
    assert peak < 1.5 * len(header)


def test_header_of_countless_values_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    header = b'{"a":{"shape":[' + b"1," * 2_000_000 + b"1]}}"
    path = write_raw(tmp_path / "x", header)
    tracemalloc.start()
    refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * len(header)


def test_file_cut_short_after_opening_is_an_error_not_a_fault(tmp_path: Path) -> None:
    save_file({"x": np.zeros(10_000, np.float32)}, tmp_path / "x")
    with SafetensorsFile(str(tmp_path / "x")) as file:
        os.truncate(tmp_path / "x", 500)
        with pytest.raises(InvalidCheckpoint, match="ended at byte 500"):
            file.read_copy("x")
        with pytest.raises(InvalidCheckpoint, match="changed"):
            file.check_unchanged()


def test_no_single_damaged_byte_of_a_header_escapes_as_another_error(tmp_path: Path) -> None:
    arrays = {"a": np.arange(3, dtype=np.float32), "b": np.arange(4, dtype=np.float16)}
    save_file(arrays, tmp_path / "x")
    sound = (tmp_path / "x").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(sound)
        damaged[rng.integers(0, len(sound) - 20)] = rng.integers(0, 256)
        (tmp_path / "y").write_bytes(damaged)
        try:
            with SafetensorsFile(str(tmp_path / "y")) as file:
                assert sum(file.num_bytes(name) for name in file.names) == 20
        except CheckpointError:
            refused += 1
    assert refused > 250


@pytest.mark.row(25)
def test_missing_file_and_directory_as_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        SafetensorsFile(str(tmp_path / "nothing"))
    with pytest.raises(InvalidCheckpoint, match="is a directory"):
        SafetensorsFile(str(tmp_path))
