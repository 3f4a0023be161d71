"""The engine process: it starts, dies, is stopped; nobody hangs and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sloraj import wire
from sloraj.config import EngineConfig
from sloraj.errors import ConfigError, EngineUnavailable, InternalError
from sloraj.messages import Dead, FromEngine, Generate, GetStats, Heartbeat, Reply, TokenOutput
from sloraj.process_transport import ProcessTransport
from sloraj.transport import ThreadTransport
from tests.open_files import open_files
from tests.sloraj.fake_core import FACTORY, MAX_MODEL_LEN

WAIT_S = 30.0
PARAMS = {"n": 1, "max_tokens": 3, "logprobs": None, "ignore_eos": False}


def config(failure: str | None = None) -> EngineConfig:
    return EngineConfig(model="/models/fake", served_model_name=failure)


def no_progress(stage: str, done: int, total: int) -> None:
    pass


class Inbox:
    """Listens to a transport; `until` waits for a message of a kind."""

    def __init__(self, transport: Any) -> None:
        self.messages: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        transport.listen(lambda batch: [self.messages.put(m) for m in batch])

    def until(self, kind: type[Any]) -> Any:
        deadline = time.monotonic() + WAIT_S
        while True:
            message = self.messages.get(timeout=max(0.01, deadline - time.monotonic()))
            if isinstance(message, kind):
                return message


def generate(adapter_id: str | None = None) -> Generate:
    return Generate(request_id="r", prompt_token_ids=[65, 66], params=PARAMS, adapter_id=adapter_id)


@pytest.fixture
def transport() -> Iterator[ProcessTransport]:
    made = ProcessTransport(config(), core_factory=FACTORY, stop_timeout_s=2.0)
    made.start(no_progress)
    yield made
    made.stop()


def is_gone(pid: int | None) -> bool:
    """No such process, not even a zombie."""
    assert pid is not None
    return not Path(f"/proc/{pid}").exists()


def test_the_process_builds_serves_and_stops_leaving_nothing() -> None:
    threads, files = set(threading.enumerate()), open_files()
    progress: list[tuple[str, int, int]] = []
    transport = ProcessTransport(config(), core_factory=FACTORY)
    info = transport.start(lambda *step: progress.append(step))
    assert info["max_model_len"] == MAX_MODEL_LEN
    assert progress == [("weights", 1, 2), ("weights", 2, 2)]
    inbox = Inbox(transport)
    transport.send(generate("shift-1"))
    outputs = [inbox.until(TokenOutput) for _ in range(3)]
    assert [o.token_ids for o in outputs] == [[66], [67], [66]]
    assert outputs[-1].finish_reason == "length"
    transport.send(GetStats(call_id=1))
    assert inbox.until(Reply).value["pid"] == transport.pid != os.getpid()
    transport.stop()
    transport.stop()
    assert inbox.until(Dead).reason == "the engine was stopped"
    assert is_gone(transport.pid)
    assert set(threading.enumerate()) <= threads
    assert open_files() <= files
    with pytest.raises(EngineUnavailable):
        transport.send(generate())


def test_a_typed_error_of_the_build_crosses_typed(capsys: pytest.CaptureFixture[str]) -> None:
    transport = ProcessTransport(config("refuse"), core_factory=FACTORY)
    with pytest.raises(ConfigError, match="max_rank: got 96") as caught:
        transport.start(no_progress)
    assert caught.value.param == "max_rank"
    assert is_gone(transport.pid)
    assert "Traceback" not in capsys.readouterr().err  # it says all there is to say


@pytest.mark.parametrize("kind", [ThreadTransport, ProcessTransport])
def test_unusable_model_files_are_a_wrong_setting(kind: Any) -> None:
    with pytest.raises(ConfigError, match="rope_theta: got -1") as caught:
        kind(config("damaged"), core_factory=FACTORY).start(no_progress)
    assert caught.value.param == "rope_theta"


def test_any_other_error_of_the_build_tells_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    transport = ProcessTransport(config("crash"), core_factory=FACTORY)
    with pytest.raises(InternalError, match=r"FileNotFoundError: model\.safetensors"):
        transport.start(no_progress)
    shown = capsys.readouterr().err
    assert "about to crash" in shown and "Traceback" in shown


def test_a_process_that_ends_while_building_is_reported_with_its_last_words() -> None:
    transport = ProcessTransport(config("exit"), core_factory=FACTORY)
    with pytest.raises(EngineUnavailable, match=r"exit code 7.*\n.*last words"):
        transport.start(no_progress)
    assert is_gone(transport.pid)


def test_a_build_that_takes_too_long_is_ended() -> None:
    transport = ProcessTransport(config("slow"), core_factory=FACTORY, start_timeout_s=2.0)
    started = time.monotonic()
    with pytest.raises(EngineUnavailable, match="not ready after 2 s"):
        transport.start(no_progress)
    assert time.monotonic() - started < WAIT_S
    assert is_gone(transport.pid)


def test_stop_ends_a_build_under_way() -> None:
    transport = ProcessTransport(config("slow"), core_factory=FACTORY)
    building = threading.Event()
    failures: list[BaseException] = []

    def start() -> None:
        try:
            transport.start(lambda *_: building.set())
        except EngineUnavailable as error:
            failures.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    assert building.wait(WAIT_S)
    transport.stop()
    thread.join(WAIT_S)
    assert len(failures) == 1
    assert is_gone(transport.pid)


@pytest.mark.parametrize("factory", ["no.such.module:build", "sloraj.errors:nothing", "nonsense"])
def test_a_factory_that_is_not_there_is_refused_by_name(factory: str) -> None:
    for transport in (
        ThreadTransport(config(), core_factory=factory),
        ProcessTransport(config(), core_factory=factory),
    ):
        with pytest.raises(ConfigError, match="core_factory: got"):
            transport.start(no_progress)


def test_an_exception_in_the_core_arrives_as_its_reason(transport: ProcessTransport) -> None:
    inbox = Inbox(transport)
    transport.send(generate("raise"))
    dead = inbox.until(Dead)
    assert "RuntimeError: the device is on fire" in dead.reason


def test_a_process_that_vanishes_is_reported_with_its_exit_code(
    transport: ProcessTransport,
) -> None:
    inbox = Inbox(transport)
    transport.send(generate("exit"))
    dead = inbox.until(Dead)
    assert "exit code 9" in dead.reason
    assert "segmentation fault, nearly" in dead.reason


@pytest.mark.row(46)
def test_a_killed_process_is_reported_by_its_signal(transport: ProcessTransport) -> None:
    inbox = Inbox(transport)
    assert transport.pid is not None
    os.kill(transport.pid, signal.SIGKILL)
    assert "signal SIGKILL" in inbox.until(Dead).reason
    with pytest.raises(EngineUnavailable):
        transport.send(generate())
    assert is_gone(transport.pid)


@pytest.mark.row(46)
def test_sigint_and_sigterm_are_left_to_the_parent(transport: ProcessTransport) -> None:
    inbox = Inbox(transport)
    assert transport.pid is not None
    os.kill(transport.pid, signal.SIGINT)
    os.kill(transport.pid, signal.SIGTERM)
    transport.send(generate())
    assert inbox.until(TokenOutput).token_ids == [65]


@pytest.mark.parametrize("fault", ["hang", "freeze"])
def test_stop_is_bounded_when_the_engine_does_not_answer(
    transport: ProcessTransport, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sloraj.process_transport.REAP_TIMEOUT_S", 0.5)
    inbox = Inbox(transport)
    inbox.until(Heartbeat)
    transport.send(generate(fault))
    time.sleep(0.2)
    started = time.monotonic()
    transport.stop()
    assert time.monotonic() - started < 15
    assert is_gone(transport.pid)


def test_a_send_to_a_process_that_does_not_read_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sloraj.process_transport.SEND_TIMEOUT_S", 1.0)
    monkeypatch.setattr("sloraj.process_transport.REAP_TIMEOUT_S", 0.5)
    transport = ProcessTransport(config(), core_factory=FACTORY, stop_timeout_s=1.0)
    transport.start(no_progress)
    inbox = Inbox(transport)
    assert transport.pid is not None
    os.kill(transport.pid, signal.SIGSTOP)
    large = Generate(request_id="r", prompt_token_ids=[65] * 100_000, params=PARAMS)
    with pytest.raises(EngineUnavailable):
        for _ in range(100):
            transport.send(large)
    transport.stop()
    inbox.until(Dead)
    assert is_gone(transport.pid)


def test_frames_cross_whole_in_any_number_of_pieces() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        batch: list[FromEngine] = [Heartbeat(step=1, num_running=2, num_waiting=3)]
        body = wire.encode(batch)
        data = len(body).to_bytes(4, "little") + body
        ours.sendall(data[:2])
        threading.Timer(0.05, ours.sendall, [data[2:7]]).start()
        threading.Timer(0.1, ours.sendall, [data[7:]]).start()
        assert wire.decode_from_engine(wire.receive_frame(theirs)) == batch
        ours.sendall(b"\xff" * 4)
        with pytest.raises(EOFError, match="the stream is torn"):
            wire.receive_frame(theirs)


PARENT = """
import sys, time
from sloraj.config import EngineConfig
from sloraj.process_transport import ProcessTransport
from tests.open_files import open_files
from tests.sloraj.fake_core import FACTORY
name = sys.argv[1] or None
transport = ProcessTransport(EngineConfig(model="m", served_model_name=name), core_factory=FACTORY)
def tell(*_): print(transport.pid, flush=True)
transport.start(tell)
time.sleep(60)
"""


@pytest.mark.row(46)
@pytest.mark.parametrize("failure", ["", "slow"], ids=["running", "building"])
def test_no_engine_outlives_a_parent_that_was_killed(failure: str) -> None:
    command = [sys.executable, "-c", PARENT, failure]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + WAIT_S
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    """Whether a process that is not ours runs; one that waits for its reaper does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
