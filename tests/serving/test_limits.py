"""Sizes, types and times of requests, over real sockets where the framing is the point."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time

import pytest
from starlette.testclient import TestClient

from serving.config import ServerConfig
from serving.connections import Connection
from tests.serving.conftest import LiveServer
from tests.serving.fake_engine import FakeEngine

LIMIT = 100_000
BODY_TIMEOUT_S = 2.0


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(max_body_bytes=LIMIT, body_timeout_s=BODY_TIMEOUT_S)


def talk(live: LiveServer, *pieces: bytes, timeout_s: float = 10) -> bytes:
    """Send the pieces, and read until the server closes or answers; a reset counts as closing."""
    received = b""
    peer = socket.create_connection(("127.0.0.1", live.port), timeout=timeout_s)
    with peer, contextlib.suppress(ConnectionError):
        for piece in pieces:
            peer.sendall(piece)
        while not _is_whole(received):
            got = peer.recv(65536)
            if not got:
                break
            received += got
    return received


def _is_whole(received: bytes) -> bool:
    head, gap, body = received.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if gap and line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return False


def status(received: bytes) -> int:
    assert received.startswith(b"HTTP/1.1 "), received[:200]
    return int(received.split(b" ")[1])


def is_alive(live: LiveServer) -> bool:
    body = b'{"prompt": "a"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return status(talk(live, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)) == 200


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.row(3)
def test_a_body_over_the_limit_is_a_413_declared_or_chunked(live: LiveServer) -> None:
    declared = talk(live, HEAD + b"Content-Length: %d\r\n\r\n" % (LIMIT + 1))
    chunk = b"%x\r\n" % 50_000 + b"x" * 50_000 + b"\r\n"
    chunked = talk(live, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk)
    huge = talk(live, HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n")
    for received in (declared, chunked):
        assert status(received) == 413
        error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "body_too_large"
        assert str(LIMIT) in error["message"]
    assert status(huge) in (400, 413)
    assert is_alive(live)


@pytest.mark.row(3)
def test_a_body_of_exactly_the_limit_is_read(client: TestClient) -> None:
    frame = json.dumps({"prompt": "a", "user": ""})
    body = json.dumps({"prompt": "a", "user": "x" * (LIMIT - len(frame))})
    assert len(body) == LIMIT
    headers = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=body, headers=headers).status_code == 200
    assert client.post("/v1/completions", content=body + " ", headers=headers).status_code == 413


@pytest.mark.row(3)
def test_a_slow_body_is_a_408(live: LiveServer) -> None:
    start_s = time.monotonic()
    received = talk(live, HEAD + b"Content-Length: 100\r\n\r\n", b'{"prompt"')
    assert status(received) == 408
    assert b"connection: close" in received.lower()
    assert BODY_TIMEOUT_S - 0.1 < time.monotonic() - start_s < 5
    assert is_alive(live)


@pytest.mark.row(3)
def test_a_lying_length_is_refused_and_harms_nobody(live: LiveServer) -> None:
    for lie in (b"-1", b"abc", b"1_0", b"+5", b"5, 7"):
        assert status(talk(live, HEAD + b"Content-Length: " + lie + b"\r\n\r\n{}")) == 400
    twice = HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"
    assert status(talk(live, twice)) == 400
    short = talk(live, HEAD + b"Content-Length: 2\r\n\r\n{}garbage garbage\r\n\r\n")
    assert status(short) == 400
    assert is_alive(live)


@pytest.mark.row(4)
def test_headers_beyond_bounds_are_refused_with_memory_flat(live: LiveServer) -> None:
    def resident_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    big = b"X-Big: " + b"x" * 5_000_000 + b"\r\n\r\n"
    for _ in range(3):
        received = talk(live, get, big)
        assert received == b"" or status(received) in (400, 431)
    many = b"".join(b"X-%d: y\r\n" % i for i in range(10_000))
    received = talk(live, get + many + b"\r\n")
    assert received == b"" or status(received) in (400, 431)
    some = b"".join(b"X-%d: y\r\n" % i for i in range(300))
    assert status(talk(live, get + some + b"\r\n")) == 431
    assert resident_bytes() - before < 50_000_000
    assert is_alive(live)


@pytest.mark.row(4)
def test_what_is_no_http_is_refused_in_our_shape(live: LiveServer) -> None:
    for nonsense in (
        b"\x16\x03\x01\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        received = talk(live, nonsense)
        assert status(received) == 400
        error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "bad_request"
    assert is_alive(live)


@pytest.mark.row(4)
def test_headers_that_never_end_close_the_connection(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "header_timeout_s", 1.0)
    whole = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    for before in (b"", whole):  # at once, and on a connection that was kept alive
        with socket.create_connection(("127.0.0.1", live.port), timeout=5) as peer:
            if before:
                peer.sendall(before)
                assert peer.recv(65536).startswith(b"HTTP/1.1 200")
            start_s = time.monotonic()
            peer.sendall(b"GET /version HTTP/1.1\r\nX-Slow: ")
            assert peer.recv(65536) == b""
            assert 0.9 < time.monotonic() - start_s < 3
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as peer:
        for _ in range(3):  # a prompt client outlives the limit
            peer.sendall(whole)
            assert peer.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.4)


@pytest.mark.row(8)
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"]
)
def test_other_types_than_json_are_a_415(client: TestClient, engine: FakeEngine, kind: str) -> None:
    body = b'{"prompt": "a"}'
    for path in ("/v1/completions", "/v1/load_lora_adapter"):
        response = client.post(path, content=body, headers={"content-type": kind})
        assert response.status_code == 415
        assert "application/json" in response.json()["error"]["message"]
    assert engine.submitted == []
    with_charset = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/v1/completions", content=body, headers=with_charset).status_code == 200


@pytest.mark.row(8)
def test_no_type_at_all_is_a_415(live: LiveServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    assert status(talk(live, head)) == 415


@pytest.mark.row(21)
def test_paths_and_methods_that_do_not_exist_are_told_in_json(client: TestClient) -> None:
    for method, path, expected in (
        ("GET", "/nowhere", 404), ("POST", "/v1/embeddings", 404), ("GET", "/v1/completions", 405),
        ("OPTIONS", "/v1/models", 405), ("DELETE", "/v1/models/x", 405),
        ("GET", "/v1/models/", 404),
        ("GET", "//v1/models", 404), ("GET", "/V1/models", 404),
    ):  # fmt: skip
        response = client.request(method, path, follow_redirects=False)
        assert response.status_code == expected, (method, path)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        if expected == 405:
            assert response.headers["allow"]
    assert client.head("/health").status_code == 200


@pytest.mark.row(21)
def test_pipelined_requests_are_answered_in_order(live: LiveServer) -> None:
    received = b""
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as peer:
        peer.sendall(
            b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
            b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        while got := peer.recv(65536):
            received += got
    assert received.index(b"200 OK") < received.index(b"404 Not Found")


@pytest.mark.row(44)
def test_the_event_loop_is_free_while_a_big_body_is_read(live: LiveServer) -> None:
    """A second connection is answered while a first one trickles its body in."""
    with socket.create_connection(("127.0.0.1", live.port)) as slow:
        slow.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        start_s = time.monotonic()
        assert is_alive(live)
        assert time.monotonic() - start_s < BODY_TIMEOUT_S  # the first is still waited for
