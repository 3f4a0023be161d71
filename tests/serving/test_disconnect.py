"""A client that goes away, or does not read, frees what it held; nobody else notices."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx2
import pytest

from serving.config import ServerConfig
from tests.serving.conftest import LiveServer, wait_until
from tests.serving.fake_engine import FakeEngine

BOUND_S = 0.1  # from the client's close to the engine's abort; the best of three, on a busy machine


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data


def leave_after(live: LiveServer, body: dict[str, Any], num_bytes: int = 0) -> float:
    """Ask, wait until it runs and `num_bytes` have come, close; the seconds until the engine let
    go.
    """
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as peer:
        peer.sendall(request("/v1/completions", body))
        wait_until(lambda: live.engine.num_running >= 1)
        while num_bytes > 0:
            num_bytes -= len(peer.recv(4096))
    closed_s = time.monotonic()
    wait_until(lambda: live.engine.num_running == 0)
    assert live.engine.aborted
    return max(live.engine.abort_times.values()) - closed_s


@pytest.mark.row(20)
@pytest.mark.parametrize("is_stream", [False, True])
def test_leaving_before_the_first_token_frees_the_request(
    live: LiveServer, engine: FakeEngine, is_stream: bool
) -> None:
    engine.first_token_delay_s = 30
    body = {"prompt": "abc", "stream": is_stream}
    assert min(leave_after(live, body) for _ in range(3)) < BOUND_S
    wait_until(lambda: httpx2.get(f"{live.url}/health").json()["running_requests"] == 0)


@pytest.mark.row(20)
@pytest.mark.parametrize("is_stream", [False, True])
def test_leaving_between_tokens_frees_every_prompt_and_choice(
    live: LiveServer, engine: FakeEngine, is_stream: bool
) -> None:
    engine.token_delay_s = 0.05
    body = {"prompt": ["abc", "de"], "n": 2, "max_tokens": 200, "stream": is_stream}
    num_bytes = 300 if is_stream else 0
    assert min(leave_after(live, body, num_bytes) for _ in range(3)) < BOUND_S
    assert len(engine.aborted) == 3 * 2


@pytest.mark.row(20)
def test_leaving_in_the_middle_of_a_body_starts_nothing(
    live: LiveServer, engine: FakeEngine
) -> None:
    with socket.create_connection(("127.0.0.1", live.port)) as peer:
        peer.sendall(request("/v1/completions", {"prompt": "abc"})[:-5])
    time.sleep(0.1)
    assert engine.submitted == []
    assert httpx2.get(f"{live.url}/health").status_code == 200


@pytest.mark.row(20)
def test_a_hundred_that_leave_do_not_disturb_one_that_stays(
    live: LiveServer, engine: FakeEngine
) -> None:
    engine.token_delay_s = 0.01
    leavers = []
    for _ in range(100):
        peer = socket.create_connection(("127.0.0.1", live.port))
        peer.sendall(
            request("/v1/completions", {"prompt": "abc", "max_tokens": 200, "stream": True})
        )
        leavers.append(peer)
    wait_until(lambda: engine.num_running == 100)
    for peer in leavers:
        peer.close()
    body = {"prompt": "abc", "max_tokens": 30}
    answer = httpx2.post(f"{live.url}/v1/completions", json=body, timeout=20)
    assert answer.json()["choices"][0]["text"] == "abc" * 10
    wait_until(lambda: engine.num_running == 0)
    assert len(engine.aborted) == 100


class TestSlowReaders:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(send_timeout_s=0.3, max_buffered_events=50)

    @pytest.mark.row(20)
    def test_a_reader_that_does_not_read_is_cut(self, live: LiveServer, engine: FakeEngine) -> None:
        engine.token_delay_s = 0.005
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(("127.0.0.1", live.port))
            # logprobs make each event large, so that the buffers of the kernel fill up
            body = {"prompt": ["abc"] * 200, "max_tokens": 200, "logprobs": 20, "stream": True}
            peer.sendall(request("/v1/completions", body))
            wait_until(lambda: engine.num_running > 0)
            wait_until(lambda: engine.num_running == 0 and len(engine.aborted) > 0, 20)
            other = httpx2.post(f"{live.url}/v1/completions", json={"prompt": "abc"}, timeout=10)
            assert other.status_code == 200
        wait_until(lambda: httpx2.get(f"{live.url}/health").json()["running_requests"] == 0)


class TestRequestTimeout:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(request_timeout_s=0.2)

    def test_a_request_that_takes_too_long_is_ended(
        self, live: LiveServer, engine: FakeEngine
    ) -> None:
        engine.token_delay_s = 0.05
        body = {"prompt": "abc", "max_tokens": 200}
        answer = httpx2.post(f"{live.url}/v1/completions", json=body)
        assert answer.status_code == 503
        assert "longer than 0.2 s" in answer.json()["error"]["message"]
        wait_until(lambda: engine.num_running == 0, 1)


class TestAnEngineThatStandsStill:
    def test_does_not_stop_the_event_loop(
        self, live: LiveServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        has_begun, may_end = threading.Event(), threading.Event()

        def blocking_abort(_: str) -> None:
            has_begun.set()
            may_end.wait(20)

        monkeypatch.setattr(engine, "abort", blocking_abort)
        engine.token_delay_s = 0.05
        with socket.socket() as peer:
            peer.connect(("127.0.0.1", live.port))
            peer.sendall(request("/v1/completions", {"prompt": "abc", "max_tokens": 200}))
            wait_until(lambda: engine.num_running > 0)
        try:
            assert has_begun.wait(5)
            assert httpx2.get(f"{live.url}/health", timeout=2).status_code == 200
        finally:
            may_end.set()
