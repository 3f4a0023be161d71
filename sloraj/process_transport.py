"""The engine in a process of its own, so that nothing else shares its interpreter lock.

The two processes share one socket pair. Each end notices the other's death by end-of-file: the
child then exits at once, the parent reaps the child and reports a `Dead` with its exit code and
last lines of stderr.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec

from sloraj import wire
from sloraj.child_process import child_environment
from sloraj.config import EngineConfig
from sloraj.errors import EngineUnavailable, SlorajError, from_wire
from sloraj.messages import Dead, FromEngine, Progress, Ready, Shutdown, ToEngine
from sloraj.transport import (
    DEFAULT_CORE_FACTORY,
    STOP_TIMEOUT_S,
    OnMessages,
    OnProgress,
    deliver,
)

START_TIMEOUT_S = 3600.0  # a first compile of a large model on a slow machine
REAP_TIMEOUT_S = 5.0  # from end-of-file, or a signal, to the child's exit
SEND_TIMEOUT_S = 30.0  # a child that reads nothing for so long is as good as dead
STDERR_TAIL_LINES = 20
_log = logging.getLogger(__name__)


class ProcessTransport:
    """Implements `Transport` over a child that runs `python -m sloraj.engine_process`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        core_factory: str = DEFAULT_CORE_FACTORY,
        start_timeout_s: float = START_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        self._spec = wire.EngineSpec(
            config=config, core_factory=core_factory, log_level=_log.getEffectiveLevel()
        )
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._send_lock = threading.Lock()
        self._stop_lock = threading.Lock()
        self._is_over = threading.Event()  # the child's end of the socket is closed
        self._is_stopping = False
        self._is_stopped = False
        self._connection: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._stderr: _StderrPump | None = None
        self._receiver: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The engine process's id, once started."""
        return self._child.pid if self._child else None

    def start(self, on_progress: OnProgress) -> dict[str, Any]:
        """Raises the child's own error, typed; EngineUnavailable if it dies or takes too long."""
        try:
            self._launch()
            return self._wait_until_ready(on_progress)
        except BaseException:
            self.stop()
            raise

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        try:
            self._child = _spawn(theirs.fileno(), write_end)
        except BaseException:
            ours.close()
            os.close(read_end)
            raise
        finally:
            theirs.close()
            os.close(write_end)
        self._stderr = _StderrPump(read_end)
        self._connection = ours
        _limit_sends(ours, SEND_TIMEOUT_S)
        with contextlib.suppress(OSError):  # it died already: the wait for Ready says why
            wire.send_frame(ours, self._spec)

    def _wait_until_ready(self, on_progress: OnProgress) -> dict[str, Any]:
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            for message in self._receive(deadline):
                if isinstance(message, Progress):
                    on_progress(message.stage, message.done, message.total)
                elif isinstance(message, Ready):
                    assert self._connection is not None
                    self._connection.settimeout(None)
                    return message.info
                elif isinstance(message, Dead):
                    raise _startup_error(message)

    def _receive(self, deadline: float | None = None) -> list[FromEngine]:
        """The next batch; a `Dead` in place of end-of-file. Only start-up has a deadline."""
        assert self._connection is not None
        try:
            if deadline is not None:
                self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            return wire.decode_from_engine(wire.receive_frame(self._connection))
        except TimeoutError:
            return [Dead(reason=f"the engine was not ready after {self._start_timeout_s:g} s")]
        except (EOFError, OSError):
            return [Dead(reason=self._describe_end())]
        except msgspec.MsgspecError as error:
            return [Dead(reason=f"the engine process sent what cannot be read: {error}")]

    def _describe_end(self) -> str:
        self._is_over.set()
        assert self._child is not None and self._stderr is not None
        if self._is_stopping:
            return "the engine was stopped"
        try:
            code = self._child.wait(REAP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        tail = self._stderr.tail()
        return f"the engine process ended with {how}" + (f"; last lines:\n{tail}" if tail else "")

    def listen(self, on_messages: OnMessages) -> None:
        self._receiver = threading.Thread(
            target=deliver, args=(self._receive, on_messages), name="sloraj-receiver", daemon=True
        )
        self._receiver.start()

    def send(self, message: ToEngine) -> None:
        if self._connection is None or self._is_over.is_set():
            raise EngineUnavailable("the engine is not running")
        try:
            with self._send_lock:
                wire.send_frame(self._connection, message)
        except OSError as error:
            with contextlib.suppress(OSError):  # a frame may be half sent: nothing can follow it
                self._connection.shutdown(socket.SHUT_RDWR)
            raise EngineUnavailable(f"the engine is not running ({error})") from error

    def stop(self) -> None:
        """Shutdown, then end-of-file, at which the child exits by itself, then SIGKILL; bounded."""
        self._is_stopping = True
        with self._stop_lock:
            if (
                self._is_stopped
                or self._child is None
                or self._connection is None
                or self._stderr is None
            ):
                return
            self._ask_to_shut_down(self._connection, self._child)
            with contextlib.suppress(OSError):  # the other end is gone already
                self._connection.shutdown(socket.SHUT_RDWR)
            if not _has_exited(self._child, REAP_TIMEOUT_S):
                self._child.kill()
                self._child.wait()
            self._is_over.set()
            if self._receiver is not None and self._receiver is not threading.current_thread():
                self._receiver.join(REAP_TIMEOUT_S)
            self._stderr.close()
            self._connection.close()
            self._is_stopped = True

    def _ask_to_shut_down(self, connection: socket.socket, child: subprocess.Popen[bytes]) -> None:
        if not self._send_lock.acquire(timeout=1.0):
            return  # a sender is stuck on a child that does not read
        try:
            _limit_sends(connection, 1.0)
            wire.send_frame(connection, Shutdown())
        except OSError:
            return  # gone, or its buffer is full: end-of-file comes next
        finally:
            self._send_lock.release()
        _has_exited(child, self._stop_timeout_s)


def _spawn(fd: int, output: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sloraj.engine_process", str(fd)]
    # The child must not be interrupted before it has set its own handlers; a blocked mask is
    # inherited.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[fd],
            env=child_environment(),
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _limit_sends(connection: socket.socket, seconds: float) -> None:
    """Make a blocking send give up after a while, leaving a receiver undisturbed."""
    timeval = struct.pack("ll", int(seconds), 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def _has_exited(child: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _startup_error(dead: Dead) -> SlorajError:
    return from_wire(dead.error) if dead.error is not None else EngineUnavailable(dead.reason)


class _StderrPump:
    """Copies the child's stdout and stderr to our stderr, and keeps the last lines."""

    def __init__(self, read_end: int) -> None:
        self._pipe = os.fdopen(read_end, encoding="utf-8", errors="replace")
        self._lines: collections.deque[str] = collections.deque(maxlen=STDERR_TAIL_LINES)
        self._thread = threading.Thread(target=self._pump, name="sloraj-stderr", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        for line in self._pipe:
            self._lines.append(line)
            with contextlib.suppress(OSError, ValueError):  # our own stderr may be closed
                sys.stderr.write(line)
                sys.stderr.flush()

    def tail(self) -> str:
        self._thread.join(1.0)
        return "".join(self._lines).rstrip()

    def close(self) -> None:
        self._thread.join(REAP_TIMEOUT_S)
        if not self._thread.is_alive():  # else a grandchild still holds the other end
            self._pipe.close()
