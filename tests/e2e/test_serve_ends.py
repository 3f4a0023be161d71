"""Ends of a server: a signal while it works, and an engine process that is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from checkpoints.demo.tasks import TASKS
from tests.e2e.served import Served, children, is_alive, served, wait_until
from tests.e2e.streams import LONG, NUM_CHOICES, Stream

TEXT = "hello world"
OPTIONS = ("--checked",)  # the programs of the server that all tests share


def completion_status(server: Served) -> int:
    body = {"model": "shift-3", "prompt": "a =>"}
    answer = server.http.post(f"{server.url}/v1/completions", json=body)
    if answer.status_code == 503:
        assert int(answer.headers["retry-after"]) >= 1
    return int(answer.status_code)


@pytest.mark.row(46)
def test_a_signal_lets_running_streams_end_and_turns_new_work_away(
    demo: Served, program_cache: Path, tmp_path: Path
) -> None:
    with served(tmp_path, program_cache, *OPTIONS) as server:
        assert server.engine_pid != demo.engine_pid
        with Stream(server, "shift-3", TEXT, **LONG) as stream:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.http.get(f"{server.url}/ready").status_code == 503)
            assert completion_status(server) == 503
            assert server.http.get(f"{server.url}/health").status_code == 200
            assert not stream.ended, "the stream was too short to tell"
        assert stream.finish_reasons == ["length"] * NUM_CHOICES
        assert all(text.startswith(TASKS["shift-3"].answer(TEXT)) for text in stream.texts)
        assert stream.events[-1] == "[DONE]"
        server.wait_gone()


@pytest.mark.row(46)
def test_a_signal_during_the_start_ends_both_processes(tmp_path: Path) -> None:
    server = Served(tmp_path, tmp_path / "empty")
    try:
        wait_until(lambda: "memory per device" in server.log, 60, "it compiles")
        pids = [server.process.pid, *children(server.process.pid)]
        assert server.engine_pid in pids
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
        wait_until(lambda: not any(map(is_alive, pids)), 15, "every process has ended")
    finally:
        server.end()


@pytest.mark.row(42)
def test_a_killed_engine_fails_its_streams_and_the_server_says_so(
    demo: Served, program_cache: Path, tmp_path: Path
) -> None:
    with served(tmp_path, program_cache, *OPTIONS, on_terminal=True) as server:
        for stage in ("compile", "adapters"):
            assert f"{stage}: 100%" in server.log
        pid = server.engine_pid
        with Stream(server, "shift-3", TEXT, **LONG) as stream:
            os.kill(pid, signal.SIGKILL)
        assert stream.events[-1] == "[DONE]"
        error = stream.events[-2]["error"]
        assert error["code"] == "engine_unavailable" and "SIGKILL" in error["message"]
        assert not is_alive(pid)
        health = server.http.get(f"{server.url}/health")
        assert health.status_code == 503 and "SIGKILL" in health.json()["reason"]
        assert server.http.get(f"{server.url}/ready").status_code == 503
        assert completion_status(server) == 503
        assert server.http.get(f"{server.url}/metrics").status_code == 200
        server.stop()
