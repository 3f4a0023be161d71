"""A server process as a user starts it, with the demo model, and what can be seen of it from
outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2

from checkpoints.demo import ADAPTERS_DIR, MODEL_DIR

ROOT = Path(__file__).parents[2]
BASE = "demo"  # the served name of the base model
START_TIMEOUT_S = 240.0  # every program is compiled first, on a machine that may be busy
STOP_TIMEOUT_S = 40.0
_SERIES = re.compile(r"^(\S+?)(?:\{.*\})? (\S+)$", re.MULTILINE)


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0, what: str = "") -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"did not come true in {timeout_s:g} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A process that still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    """Every process below this one."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, tasks.read_text().split()):
            found += [child, *children(child)]
    return found


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a process holds of the machine."""

    num_threads: int
    num_files: int
    resident_mib: float

    @classmethod
    def of(cls, pid: int) -> Footprint:
        process = Path(f"/proc/{pid}")
        pages = int((process / "statm").read_text().split()[1])
        return cls(
            num_threads=len(os.listdir(process / "task")),
            num_files=len(os.listdir(process / "fd")),
            resident_mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        )


class Served:
    """`python -m serving serve` with the demo in a process of its own, its engine in another."""

    def __init__(self, folder: Path, cache: Path, *options: str, on_terminal: bool = False) -> None:
        """`folder` takes the log and is where adapters may be loaded from at run time.

        `cache` keeps compiled programs. `on_terminal` gives the process a terminal as its stderr.
        """
        self.root = folder / "loadable"
        self.root.mkdir()
        self._log_path = folder / "server.log"
        self.http = httpx2.Client(  # keeps no connection, so that open files can be counted
            timeout=60, limits=httpx2.Limits(max_keepalive_connections=0), verify=False
        )
        command = [
            sys.executable, "-m", "serving", "serve", str(MODEL_DIR),
            "--adapters-dir", str(ADAPTERS_DIR), "--adapter-root", str(self.root),
            "--served-model-name", BASE, "--port", "0", "--max-num-seqs", "16",
            "--max-num-batched-tokens", "128", "--compilation-cache-dir", str(cache), *options,
        ]  # fmt: skip
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        env["PYTHONPATH"] = str(ROOT)
        with contextlib.ExitStack() as ours:
            log = ours.enter_context(self._log_path.open("ab"))
            stderr = self._open_terminal(ours) if on_terminal else log.fileno()
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=stderr)

    def _open_terminal(self, ours: contextlib.ExitStack) -> int:
        """A terminal's far end, for the process; what is written to it goes to the log."""
        near, far = pty.openpty()
        termios.tcsetwinsize(far, (24, 100))
        ours.callback(os.close, far)
        threading.Thread(target=self._copy_terminal, args=(near,), daemon=True).start()
        return far

    def _copy_terminal(self, near: int) -> None:
        with (
            open(near, "rb", buffering=0) as terminal,
            self._log_path.open("ab") as log,
            contextlib.suppress(OSError),  # how a terminal says that nobody writes any more
        ):
            while part := terminal.read(4096):
                log.write(part)
                log.flush()

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def wait_ready(self) -> None:
        """Wait for the line that says so, and then ask."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"^ready: http://127\.0\.0\.1:(\d+)\s", self.log, re.M)):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        self.port = int(found[1])
        assert self.http.get(f"{self.url}/ready").status_code == 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine_pid(self) -> int:
        (pid,) = (pid for pid in children(self.process.pid) if _is_engine(pid))
        return pid

    def metrics(self) -> dict[str, float]:
        """Series of /metrics without labels, and the last of those with, by name."""
        text = self.http.get(f"{self.url}/metrics").text
        return {name: float(value) for name, value in _SERIES.findall(text)}

    def engine(self, name: str) -> float:
        return self.metrics()[f"sloraj:engine_{name}"]

    def wait_idle(self) -> None:
        """Until no request runs, no adapter is in use, and all other pages are free."""

        def is_idle() -> bool:
            seen = self.metrics()
            return (
                seen["sloraj:engine_num_requests"] == 0
                and seen["sloraj:engine_num_running"] == seen["sloraj:engine_num_waiting"] == 0
                and seen["sloraj:engine_num_leases"] == 0
                and seen["sloraj:engine_num_pages_adapters_idle"]
                == seen["sloraj:engine_num_pages_adapters"]
                == seen["sloraj:engine_num_pages"] - seen["sloraj:engine_num_pages_free"]
                and self.http.get(f"{self.url}/health").json()["running_requests"] == 0
            )

        wait_until(is_idle, what="the engine is idle and holds nothing")

    def copy_of(self, adapter: str, name: str) -> Path:
        """Put a copy of a demo adapter where it may be loaded from, in place of what was there."""
        path = self.root / name
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(ADAPTERS_DIR / adapter, path)
        return path

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.wait_gone()

    def wait_gone(self) -> None:
        """It must end with status 0 in time, leaving no process and a free port."""
        pids = [self.process.pid, *children(self.process.pid)]
        assert self.process.wait(STOP_TIMEOUT_S) == 0, self.log
        wait_until(lambda: not any(map(is_alive, pids)), 5, "every process has ended")
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", self.port))

    def end(self) -> None:
        """Leave nothing behind, whatever happened. The engine ends by itself without its parent."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.http.close()


def _is_engine(pid: int) -> bool:
    try:
        return b"sloraj.engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def served(folder: Path, cache: Path, *options: str, on_terminal: bool = False) -> Iterator[Served]:
    """A ready server, killed at the end if the test has not stopped it."""
    server = Served(folder, cache, *options, on_terminal=on_terminal)
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()
