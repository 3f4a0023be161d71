"""Signals to a real server process: it drains, refuses new work, and ends with status 0."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from serving.config import ServerConfig
from serving.server import bind
from sloraj.errors import ConfigError
from tests.serving.conftest import wait_until

ROOT = Path(__file__).parents[2]


class Served:
    """A server process and the address it printed."""

    def __init__(self, delay_s: float, timeout_s: float, start_s: float = 0.0) -> None:
        script = Path(__file__).with_name("serve_fake.py")
        command = [sys.executable, str(script), str(delay_s), str(timeout_s), str(start_s)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_ready(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r"ready: (http://\S+) serves 'fake-base' and 0 adapters", line)
        assert found, line
        self.url = found[1]
        self.hint = self.process.stdout.readline()
        return self.url

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    served = Served(*request.param)
    yield served
    served.end()


def ask(url: str, found: dict[str, Any], **body: Any) -> threading.Thread:
    def run() -> None:
        response = httpx2.post(f"{url}/v1/completions", json={"prompt": "a", **body}, timeout=30)
        found["status"], found["text"] = response.status_code, response.text

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: httpx2.get(f"{url}/health").json()["running_requests"] == 1)
    return thread


@pytest.mark.row(46)
@pytest.mark.parametrize("served", [(0.05, 30.0)], indirect=True)
def test_a_running_request_is_finished_and_a_new_one_turned_away(served: Served) -> None:
    url, found = served.wait_ready(), {}  # type: tuple[str, dict[str, Any]]
    asking = ask(url, found, max_tokens=60)
    served.process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx2.get(f"{url}/ready").status_code == 503)
    assert httpx2.get(f"{url}/health").status_code == 200
    refused = httpx2.post(f"{url}/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 503 and refused.headers["retry-after"]
    asking.join(30)
    assert found["status"] == 200
    assert json.loads(found["text"])["choices"][0]["text"] == "a" * 60
    assert served.process.wait(10) == 0


@pytest.mark.row(46)
@pytest.mark.parametrize("served", [(0.05, 0.3)], indirect=True)
def test_a_request_that_outlasts_the_drain_ends_with_an_error_event(served: Served) -> None:
    url, found = served.wait_ready(), {}  # type: tuple[str, dict[str, Any]]
    asking = ask(url, found, max_tokens=200, stream=True)
    served.process.send_signal(signal.SIGTERM)
    asking.join(10)
    assert found["status"] == 200
    events = found["text"].split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert events[-2:] == ["data: [DONE]", ""]
    assert served.process.wait(10) == 0


@pytest.mark.row(46)
@pytest.mark.parametrize("served", [(30.0, 60.0)], indirect=True)
def test_a_second_signal_ends_it_at_once(served: Served) -> None:
    url = served.wait_ready()
    peer = threading.Thread(target=_ask_and_lose, args=(url,))
    peer.start()
    wait_until(lambda: httpx2.get(f"{url}/health").json()["running_requests"] == 1)
    served.process.send_signal(signal.SIGINT)
    wait_until(lambda: httpx2.get(f"{url}/ready").status_code == 503)
    start_s = time.monotonic()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(10) == 0
    assert time.monotonic() - start_s < 3
    peer.join(5)
    assert not peer.is_alive()


def _ask_and_lose(url: str) -> None:
    body = {"prompt": "a", "max_tokens": 99}
    with pytest.raises(httpx2.HTTPError):
        httpx2.post(f"{url}/v1/completions", json=body, timeout=30).raise_for_status()


@pytest.mark.row(46)
@pytest.mark.parametrize("served", [(0.0, 20.0, 30.0)], indirect=True)
def test_it_can_be_stopped_while_the_engine_starts(served: Served) -> None:
    assert served.process.stderr is not None
    while "startup complete" not in (line := served.process.stderr.readline()):
        assert line  # else it ended
    start_s = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(10) == 0
    assert time.monotonic() - start_s < 5


@pytest.mark.parametrize("served", [(0.0, 5.0)], indirect=True)
def test_the_printed_curl_line_works(served: Served) -> None:
    served.wait_ready()
    assert served.hint.startswith("try: curl ")
    command = served.hint.removeprefix("try: ").replace("curl ", "curl -sS ")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20)
    assert json.loads(done.stdout)["choices"][0]["text"] == "HelloHelloHelloH"


@pytest.mark.parametrize("served", [(0.0, 5.0, -1.0)], indirect=True)
def test_an_engine_that_does_not_start_ends_the_server_with_the_reason(served: Served) -> None:
    out, errors = served.process.communicate(timeout=20)
    assert served.process.returncode == 1
    assert "did not start: model: got '/x'" in errors
    assert "Traceback" not in errors
    assert "ready" not in out


def test_a_port_that_is_taken_is_refused_by_name() -> None:
    config = ServerConfig(port=0)
    with bind(config) as bound:
        bound.listen()
        taken = ServerConfig(port=bound.getsockname()[1])
        with pytest.raises(ConfigError, match="choose another with --port"):
            bind(taken)
