"""Main of the engine process: `python -m sloraj.engine_process FD`, run by `ProcessTransport`.

Three threads: the main one builds and runs the core; one reads the parent's messages; one writes to
it, so that the step loop never waits for a socket. The process exits at once when its parent's end
closes.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback

from checkpoints.errors import CheckpointError
from sloraj import wire
from sloraj.errors import SlorajError
from sloraj.messages import Dead, FromEngine, Progress, Ready, Shutdown
from sloraj.transport import Core, build_error, resolve_factory

EXIT_ORPHANED = 3  # the parent is gone; nobody reads this code
EXIT_FAILED = 1
FLUSH_TIMEOUT_S = 5.0


def main(fd: int) -> int:
    """Exit code of a process that was told to shut down (0) or could not go on (1)."""
    signals = {signal.SIGINT, signal.SIGTERM}
    for number in signals:  # a terminal sends Ctrl-C to the whole group: the parent decides
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    connection = socket.socket(fileno=fd)
    spec = wire.decode_spec(wire.receive_frame(connection))
    _set_up_logging(spec.log_level)
    writer = _Writer(connection)
    reader = _Reader(connection)
    try:
        core, info = resolve_factory(spec.core_factory)(
            spec.config,
            lambda stage, done, total: writer.put([Progress(stage=stage, done=done, total=total)]),
        )
        gc.freeze()  # all of it lives as long as the process, and no collection need walk it
        reader.attach(core)
        writer.put([Ready(info=info)])
        core.run(writer.put)
    except Exception as error:
        if not isinstance(error, SlorajError | CheckpointError):  # these say all there is to say
            traceback.print_exc()
        writer.put(
            [Dead(reason=f"{type(error).__name__}: {error}", error=build_error(error).to_wire())]
        )
        writer.close()
        return EXIT_FAILED
    writer.close()
    return 0


def _set_up_logging(level: int) -> None:
    """To stderr, which the parent passes on: our loggers as it has them, others from WARNING up."""
    logging.basicConfig(format="%(levelname)s engine: %(message)s")
    for package in ("sloraj", "checkpoints", "pallas_kernels"):
        logging.getLogger(package).setLevel(level)


class _Writer:
    """Sends batches to the parent in order, from a thread of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[list[FromEngine] | None] = queue.SimpleQueue()
        self.put = self._queue.put
        self._thread = threading.Thread(target=self._run, name="sloraj-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                wire.send_frame(self._connection, batch)
            except OSError:
                os._exit(EXIT_ORPHANED)

    def close(self) -> None:
        """Send what is queued, within a bound."""
        self._queue.put(None)
        self._thread.join(FLUSH_TIMEOUT_S)


class _Reader:
    """Reads the parent's messages from the start, so that its death ends even a long build."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._core: Core | None = None
        self._has_core = threading.Event()
        threading.Thread(target=self._run, name="sloraj-reader", daemon=True).start()

    def attach(self, core: Core) -> None:
        self._core = core
        self._has_core.set()

    def _run(self) -> None:
        while True:
            try:
                message = wire.decode_to_engine(wire.receive_frame(self._connection))
            except (EOFError, OSError):
                os._exit(EXIT_ORPHANED)
            if isinstance(message, Shutdown) and self._core is None:
                os._exit(0)  # told to stop while building: there is nothing to wind down
            self._has_core.wait()
            assert self._core is not None
            self._core.submit(message)


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # device libraries may hang in their exit handlers; nothing is left to save
