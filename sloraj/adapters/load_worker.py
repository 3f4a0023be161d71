"""Main of a loader process: `python -m sloraj.adapters.load_worker FD MEMORY_FD`.

Reads, checks and packs one adapter at a time, away from the interpreter that runs the step loop.
Pages are laid in memory shared with the parent (`load_processes.py`); all else goes through a
socket pair in frames. The process ends when its parent's end closes.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import signal
import socket
import sys
from typing import Any

import msgspec
import numpy as np

from checkpoints.model_config import ModelConfig
from checkpoints.peft_adapter import read_adapter
from sloraj import wire
from sloraj.adapters.layout import pack_adapter
from sloraj.adapters.loader import MISSING, UNUSABLE
from sloraj.batch import PackedAdapter
from sloraj.config import PoolLayout
from sloraj.errors import SlorajError

NICENESS = 5  # where cores are few, the step loop comes first

Array = np.ndarray[Any, np.dtype[Any]]


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """First frame to a loader process: what adapters are checked against and packed for."""

    model: ModelConfig
    layout: PoolLayout
    max_rank: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An adapter whose pages lie at the start of the shared memory."""

    version_id: str
    shape: tuple[int, int, int]  # of the pages, in the layout's dtype
    segments: bytes  # i32
    segments_shape: tuple[int, int, int]
    max_rank: int


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Why there is no adapter, in words; what the files are to blame for, or our own error."""

    message: str
    is_missing: bool = False  # a file or directory
    is_unusable: bool = False  # found, but not as it must be
    error: dict[str, Any] | None = None  # `SlorajError.to_wire`


decode_spec = msgspec.msgpack.Decoder(LoadSpec).decode
decode_path = msgspec.msgpack.Decoder(str).decode
decode_result = msgspec.msgpack.Decoder(Loaded | LoadFailed).decode


class SharedMemory:
    """Anonymous memory behind a file, mapped as far as it is needed."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._map: mmap.mmap | None = None

    def bytes(self, num_bytes: int) -> Array:
        """The first `num_bytes`, u8; the memory grows to hold them."""
        if os.fstat(self._file.fileno()).st_size < num_bytes:
            self._file.truncate(num_bytes)
        if self._map is None or len(self._map) < num_bytes:
            self._map = mmap.mmap(self._file.fileno(), num_bytes)
        return np.frombuffer(self._map, np.uint8, count=num_bytes)

    def release(self) -> None:
        """Give the memory back to the system; what views there are must not be read again."""
        self._map = None
        self._file.truncate(0)


def main(connection: socket.socket, memory: SharedMemory) -> None:
    spec = decode_spec(wire.receive_frame(connection))
    while True:
        wire.send_frame(connection, load(decode_path(wire.receive_frame(connection)), spec, memory))


def load(path: str, spec: LoadSpec, memory: SharedMemory) -> Loaded | LoadFailed:
    """Read the adapter at `path`, packed into `memory`; what goes wrong is told, not raised."""

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        num_bytes = math.prod(shape) * dtype.itemsize
        return memory.bytes(num_bytes).view(dtype).reshape(shape)

    try:
        weights = read_adapter(path, spec.model, max_rank=spec.max_rank)
        return _loaded(pack_adapter(weights, spec.layout, spec.model, allocate))
    except SlorajError as error:
        return LoadFailed(message=str(error), error=error.to_wire())
    except MISSING as error:
        return LoadFailed(message=str(error), is_missing=True)
    except UNUSABLE as error:
        return LoadFailed(message=str(error), is_unusable=True)
    except Exception as error:  # the next load may do better than this one
        return LoadFailed(message=f"{error} ({type(error).__name__})")


def _loaded(packed: PackedAdapter) -> Loaded:
    num_pages, num_layers, num_elems = packed.pages.shape
    return Loaded(
        version_id=packed.version_id,
        shape=(num_pages, num_layers, num_elems),
        segments=packed.segments.tobytes(),
        segments_shape=packed.segments.shape,
        max_rank=packed.max_rank,
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group: the parent decides
    os.nice(NICENESS)
    try:
        memory = SharedMemory(io.FileIO(int(sys.argv[2]), "r+"))
        main(socket.socket(fileno=int(sys.argv[1])), memory)
    except (EOFError, OSError):  # the parent is gone, or has closed its end
        sys.exit(0)
