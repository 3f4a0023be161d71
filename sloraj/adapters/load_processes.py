"""Adapter loads in processes of their own: the step loop's interpreter takes no part in them.

A load is tens of milliseconds of Python and numpy. In a thread beside the step loop each of its
hundreds of calls waits for the interpreter, and the loop waits for them; in another process it
costs the engine one copy of the packed pages, made without the interpreter.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint
from sloraj import wire
from sloraj.adapters.layout import Allocate, pool_dtype
from sloraj.adapters.load_worker import Loaded, LoadFailed, LoadSpec, SharedMemory, decode_result
from sloraj.batch import PackedAdapter
from sloraj.child_process import child_environment
from sloraj.errors import EngineUnavailable, InternalError, from_wire

KEPT_BYTES = 256 << 20  # of shared memory that a process keeps between loads
GRACE_S = 0.1  # for a process that has ended, or is about to, to be counted as such
_log = logging.getLogger(__name__)


class ProcessGone(Exception):
    """The process ended, or was closed, during a load."""


class LoaderProcess:
    """One process that loads one adapter at a time. It lives until `close`, or its own fault."""

    def __init__(self, spec: LoadSpec) -> None:
        self._dtype = pool_dtype(spec.layout)
        self._file = io.FileIO(os.memfd_create("sloraj-adapter"), "r+")
        self._memory = SharedMemory(self._file)
        self._connection, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(self._file.fileno())]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sloraj.adapters.load_worker", *arguments],
                pass_fds=(theirs.fileno(), self._file.fileno()),
                stdin=subprocess.DEVNULL,
                env=child_environment(),
            )
        finally:
            theirs.close()
        wire.send_frame(self._connection, spec)

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, path: str, allocate: Allocate) -> tuple[PackedAdapter, dict[str, Any]]:
        """As a `LoadFunction`. Raises ProcessGone if there is no process to do it."""
        try:
            wire.send_frame(self._connection, path)
            result = decode_result(wire.receive_frame(self._connection))
            if isinstance(result, Loaded):
                packed = self._packed(result, allocate)
                return packed, {"rank": result.max_rank, "path": path}
        except (EOFError, OSError, ValueError) as error:  # ValueError: the memory's file is closed
            raise ProcessGone from error
        raise _error(result)

    def _packed(self, loaded: Loaded, allocate: Allocate) -> PackedAdapter:
        pages = allocate(loaded.shape, self._dtype)
        into = pages.reshape(-1).view(np.uint8)
        np.copyto(into, self._memory.bytes(into.nbytes))
        if into.nbytes > KEPT_BYTES:
            self._memory.release()
        segments = np.frombuffer(loaded.segments, np.int32).reshape(loaded.segments_shape)
        return PackedAdapter(loaded.version_id, pages, segments, loaded.max_rank)

    def close(self) -> int:
        """End the process, whatever it does; its exit code, which may be that of its own end."""
        with contextlib.suppress(OSError):  # its end is closed already
            self._connection.shutdown(socket.SHUT_RDWR)  # an idle one ends by itself
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._connection.close()
        self._file.close()
        return code


class LoaderProcesses:
    """A `LoadFunction` for as many threads as there are processes. Thread-safe."""

    def __init__(self, spec: LoadSpec, allocate: Allocate, num_processes: int) -> None:
        self._spec, self._allocate = spec, allocate
        self._lock = threading.Lock()  # of what follows
        self._idle: queue.SimpleQueue[LoaderProcess | None] = queue.SimpleQueue()
        self._processes = [LoaderProcess(spec) for _ in range(num_processes)]
        self._is_closed = False
        for process in self._processes:
            self._idle.put(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def __call__(self, path: str) -> tuple[PackedAdapter, dict[str, Any]]:
        """Raises CheckpointError or SlorajError; InternalError if the process ended meanwhile,
        which another then replaces.
        """
        process = self._idle.get()
        if process is None:
            self._idle.put(None)  # for the next thread that waits
            raise EngineUnavailable("the engine was shut down")
        try:
            return process.load(path, self._allocate)
        except ProcessGone:
            with self._lock:
                if self._is_closed:
                    raise EngineUnavailable("the engine was shut down") from None
                code = process.close()
                self._processes.remove(process)
                process = LoaderProcess(self._spec)
                self._processes.append(process)
            _log.warning("a loader process ended with code %d while it read %r", code, path)
            raise InternalError(f"its loader process ended with code {code}") from None
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End all processes; a load under way or yet to come fails with EngineUnavailable."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                while not self._idle.empty():
                    self._idle.get()
                self._idle.put(None)
                for process in self._processes:
                    process.close()


def _error(failed: LoadFailed) -> Exception:
    if failed.error is not None:
        return from_wire(failed.error)
    if failed.is_missing:
        return CheckpointNotFound(failed.message)
    return (
        InvalidCheckpoint(failed.message) if failed.is_unusable else InternalError(failed.message)
    )
