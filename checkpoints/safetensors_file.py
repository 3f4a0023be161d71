"""One safetensors file: header validated in full first, tensors then read without a copy.

Layout: 8 bytes little-endian header length n, n bytes of JSON, then the data. Each header entry is
`name: {"dtype", "shape", "data_offsets": [begin, end]}` with offsets into the data, which the
tensors must tile without overlap or hole.
Source: https://github.com/huggingface/safetensors (format section of its README).
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.config_fields import parse_object, shown
from checkpoints.errors import InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.file_access import open_regular, read_exactly

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000
_MAX_COMMAS = (
    16 * MAX_TENSORS
)  # a tensor entry has about six; bounds what the JSON parser may build
_MAX_DIMENSIONS = 8

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies: byte range [begin, end) of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A validated, open safetensors file (context manager).

    `read` gives views on a memory map: no copy, alive as long as the view is, but a file truncated
    by someone else then faults on access.
    `read_copy` gives an owned array, and an error instead of a fault: use it for files that others
    may replace.
    """

    def __init__(self, path: str, *, root: str | None = None) -> None:
        """Open and validate. Raises any CheckpointError; see `open_regular` for `root`."""
        self.path = path
        self._map: mmap.mmap | None = None
        self._descriptor = open_regular(path, root=root)
        try:
            self._opened_as = _fingerprint(self._descriptor)
            self._entries = _read_header(self._descriptor, path)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. The map itself goes with the last view that `read` gave out."""
        self._map = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names, in the order of their bytes in the file."""
        return tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._entry(name).dtype

    def num_bytes(self, name: str) -> int:
        entry = self._entry(name)
        return entry.end - entry.begin

    def read(self, name: str) -> NDArray[Any]:
        """A read-only view on the memory map."""
        entry = self._entry(name)
        count = math.prod(entry.shape)
        if count == 0:
            return np.zeros(entry.shape, entry.dtype)
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(self._map, entry.dtype, count=count, offset=entry.begin)
        return flat.reshape(entry.shape)

    def read_copy(self, name: str) -> NDArray[Any]:
        """An owned, writable copy. Raises InvalidCheckpoint if the file was cut short."""
        entry = self._entry(name)
        copied = np.empty(entry.shape, entry.dtype)
        into = memoryview(copied.reshape(-1).view(np.uint8).data)
        read_exactly(self._descriptor, into, entry.begin, self.path)
        return copied

    def check_unchanged(self) -> None:
        """Raises InvalidCheckpoint if size or time stamp changed since the file was opened."""
        if _fingerprint(self._descriptor) != self._opened_as:
            raise InvalidCheckpoint(f"{self.path}: changed while it was being read")

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise InvalidCheckpoint(f"{self.path}: holds no tensor {name!r}", field=name)
        return self._entries[name]


def _fingerprint(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _read_header(descriptor: int, path: str) -> dict[str, _Entry]:
    file_bytes = os.fstat(descriptor).st_size
    if file_bytes < 8:
        raise InvalidCheckpoint(f"{path}: is {file_bytes} bytes, not a safetensors file")
    prefix = bytearray(8)
    read_exactly(descriptor, memoryview(prefix), 0, path)
    header_bytes = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, file_bytes - 8)
    if not 2 <= header_bytes <= limit:
        raise InvalidCheckpoint(
            f"{path}: header length is {header_bytes}, allowed is 2 to {limit} (truncated, or not "
            "safetensors)"
        )
    raw = bytearray(header_bytes)
    read_exactly(descriptor, memoryview(raw), 8, path)
    # Counted before parsing, so that a hostile header cannot make the parser build millions of
    # objects.
    if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b",") > _MAX_COMMAS:
        raise InvalidCheckpoint(f"{path}: header describes more than {MAX_TENSORS} tensors")
    header = parse_object(bytes(raw), path)
    _check_metadata(header.pop("__metadata__", {}), path)
    start = 8 + header_bytes
    entries = [(name, _parse_entry(name, entry, start, path)) for name, entry in header.items()]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    _check_tiling(entries, start, file_bytes, path)
    return dict(entries)


def _check_metadata(metadata: object, path: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidCheckpoint(
            f"{path}: __metadata__ must map strings to strings", field="__metadata__"
        )


def _parse_entry(name: str, entry: object, start: int, path: str) -> _Entry:
    def wrong(what: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{path}: tensor {shown(name)}: {what}", field=name)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("entry must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnsupportedCheckpoint(
            f"{path}: tensor {shown(name)}: dtype is {shown(dtype)}, known are "
            f"{', '.join(_DTYPES)}",
            field=name,
        )
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise wrong(
            f"shape is {shown(shape)}, allowed is a list of at most {_MAX_DIMENSIONS} sizes"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets is {shown(offsets)}, allowed is [begin, end]")
    needed, given = math.prod(shape) * _DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if needed != given:
        raise wrong(
            f"{dtype} of shape {shown(shape)} takes {shown(needed)} bytes, data_offsets give "
            f"{given}"
        )
    return _Entry(_DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value
    )


def _check_tiling(
    entries: list[tuple[str, _Entry]], start: int, file_bytes: int, path: str
) -> None:
    position = start
    for name, entry in entries:
        if entry.begin != position:
            fault = (
                "overlaps the tensor before it"
                if entry.begin < position
                else "leaves a hole before it"
            )
            raise InvalidCheckpoint(f"{path}: tensor {shown(name)} {fault}", field=name)
        position = entry.end
    if position != file_bytes:
        raise InvalidCheckpoint(
            f"{path}: is {file_bytes} bytes, its header describes {position} (truncated, or bytes "
            "added)"
        )
