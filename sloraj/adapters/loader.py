"""Adapter files to packed pages, in a few worker threads: no file is read on the step thread.

On a GPU the threads only wait for processes that do the work (`load_processes.py`).
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from checkpoints.errors import CheckpointError, CheckpointNotFound
from sloraj.batch import PackedAdapter
from sloraj.errors import AdapterFilesNotFound, AdapterLoadError, InternalError, SlorajError
from sloraj.messages import LoadAdapter

NUM_THREADS = 4
# Reading a file gives the interpreter lock away hundreds of times, and waits a turn of the step
# thread for each. With turns of 5 ms, Python's own, four loads beside a busy thread took 709 ms,
# with these 283.
TURN_S = 0.0005

MISSING = (CheckpointNotFound, FileNotFoundError, NotADirectoryError)  # raised by the file readers
UNUSABLE = (CheckpointError, OSError)  # and these, for files that are there

LoadFunction = Callable[[str], tuple[PackedAdapter, dict[str, Any]]]


@dataclasses.dataclass(frozen=True, slots=True)
class LoadDone:
    """A load that ended: `packed`, or `error`."""

    message: LoadAdapter
    packed: PackedAdapter | None = None
    error: SlorajError | None = None


class ShortTurns:
    """While anyone is inside, threads take short turns at the interpreter; process-wide."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._outside_s = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._outside_s = sys.getswitchinterval()
                if self._outside_s > TURN_S:
                    sys.setswitchinterval(TURN_S)
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0 and self._outside_s > TURN_S:
                sys.setswitchinterval(self._outside_s + 5e-7)  # it cuts to whole microseconds


short_turns = ShortTurns()  # one for the process, as the setting is


def loader_threads(num_threads: int) -> Executor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="adapter-loader")


class AdapterLoader:
    """Runs `load` for each message and hands LoadDone to `on_done`, from a worker thread."""

    def __init__(
        self,
        load: LoadFunction,
        on_done: Callable[[LoadDone], None],
        executor: Executor | None = None,
        close_load: Callable[[], None] | None = None,
    ) -> None:
        self._load = load
        self._on_done = on_done
        self._close_load = close_load
        self._executor = executor or loader_threads(NUM_THREADS)

    def start(self, message: LoadAdapter) -> None:
        future = self._executor.submit(self._load, message.path)
        future.add_done_callback(lambda done: self._report(message, done))

    def close(self) -> None:
        """Start no further load. One under way runs to its end, unheard."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._close_load is not None:
            self._close_load()

    def _report(
        self, message: LoadAdapter, future: Future[tuple[PackedAdapter, dict[str, Any]]]
    ) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._on_done(LoadDone(message, packed=future.result()[0]))
        else:
            self._on_done(LoadDone(message, error=load_error(message, error)))


def load_error(message: LoadAdapter, error: BaseException) -> SlorajError:
    """The error a caller sees for what the file readers raised."""
    if isinstance(error, SlorajError):
        return error
    what = f"adapter {message.adapter_id!r} at {message.path!r}: {error}"
    if isinstance(error, MISSING):
        return AdapterFilesNotFound(what, param="lora_path")
    if isinstance(error, UNUSABLE):
        return AdapterLoadError(what, param="lora_path")
    return InternalError(f"{what} ({type(error).__name__})")
