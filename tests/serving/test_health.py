"""Health that means it: starting, ready, frozen, draining and dead engines, as clients see them."""

from __future__ import annotations

import threading

import httpx2
import pytest
from starlette.testclient import TestClient

from serving.app import create_app
from serving.config import ServerConfig
from sloraj.errors import ConfigError
from tests.serving.conftest import LiveServer, wait_until
from tests.serving.fake_engine import FakeEngine

ASK = {"prompt": "abc"}


def test_a_ready_engine_is_healthy_and_ready(client: TestClient) -> None:
    for path in ("/health", "/ready", "/ping"):
        assert client.get(path).status_code == 200
    assert client.post("/ping").status_code == 200
    assert client.get("/version").json()["version"]


def test_the_port_answers_while_the_engine_starts(engine: FakeEngine) -> None:
    may_start = threading.Event()

    def start() -> FakeEngine:
        may_start.wait(10)
        return engine

    with TestClient(create_app(start)) as client:
        for path in ("/health", "/ready"):
            response = client.get(path)
            assert response.status_code == 503
            assert response.json()["reason"] == "starting"
        early = client.post("/v1/completions", json=ASK)
        assert early.status_code == 503
        assert early.headers["retry-after"] == "1"
        assert "starting" in early.json()["error"]["message"]
        assert client.get("/metrics").status_code == 200
        may_start.set()
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v1/completions", json=ASK).status_code == 200


def test_an_engine_that_cannot_start_is_told_about() -> None:
    def start() -> FakeEngine:
        raise ConfigError("model: got '/x', allowed: a directory with config.json")

    with TestClient(create_app(start)) as client:
        wait_until(lambda: client.get("/health").json()["engine"] == "dead")
        response = client.get("/health")
        assert response.status_code == 503
        assert "did not start: model: got '/x'" in response.json()["reason"]
        assert client.post("/v1/completions", json=ASK).status_code == 503


def test_an_engine_that_starts_after_the_server_stopped_is_stopped_too(engine: FakeEngine) -> None:
    may_start = threading.Event()

    def start() -> FakeEngine:
        may_start.wait(10)
        return engine

    with TestClient(create_app(start)):
        pass
    may_start.set()
    wait_until(lambda: engine.health().state == "dead")


@pytest.mark.row(42)
def test_a_dead_engine_fails_its_requests_and_the_server_says_so(
    live: LiveServer, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.first_token_delay_s = 30
    answers: list[httpx2.Response] = []
    url = f"{live.url}/v1/completions"
    asking = threading.Thread(target=lambda: answers.append(httpx2.post(url, json=ASK, timeout=20)))
    asking.start()
    wait_until(lambda: engine.num_running == 1)
    engine.die("device lost")
    asking.join(5)
    assert answers[0].status_code == 503
    assert "device lost" in answers[0].json()["error"]["message"]
    health = httpx2.get(f"{live.url}/health")
    assert health.status_code == 503
    assert health.json()["engine"] == "dead" and "device lost" in health.json()["reason"]
    assert httpx2.get(f"{live.url}/ready").status_code == 503
    for path in ("/v1/models", "/v1/models/fake-base"):
        assert httpx2.get(f"{live.url}{path}").status_code == 503
    after = httpx2.post(url, json=ASK)
    assert after.status_code == 503 and after.headers["retry-after"]
    told = [record.getMessage() for record in caplog.records if record.name == "serving"]
    assert told == ["the engine is dead: device lost"]  # once, however often it is asked


def test_a_full_queue_is_a_503_with_the_engines_own_delay(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.max_waiting = 0
    for body in (ASK, {**ASK, "stream": True}):
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"]["code"] == "queue_full"


@pytest.mark.row(52)
def test_what_would_begin_too_late_is_a_503_with_the_engines_own_delay(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.is_late = True
    for body in (ASK, {**ASK, "stream": True}):  # a stream as well: no header has been sent yet
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"]["code"] == "first_token_too_late"


class TestHeartbeat:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(heartbeat_timeout_s=0.2)

    @pytest.mark.row(43)
    def test_silence_counts_only_while_there_is_work(
        self, live: LiveServer, engine: FakeEngine
    ) -> None:
        engine.is_frozen = True
        wait_until(lambda: engine.health().heartbeat_age_s > 0.3)
        assert httpx2.get(f"{live.url}/health").status_code == 200
        asking = threading.Thread(
            target=lambda: httpx2.post(f"{live.url}/v1/completions", json=ASK, timeout=20)
        )
        asking.start()
        wait_until(lambda: httpx2.get(f"{live.url}/health").status_code == 503)
        assert "silent" in httpx2.get(f"{live.url}/health").json()["reason"]
        engine.is_frozen = False
        asking.join(5)
        assert httpx2.get(f"{live.url}/health").status_code == 200
