"""Keys: deny by default on the path the router sees, compared whole, two levels."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from serving.app import ROUTES, create_app
from serving.auth import OPEN_PATHS
from serving.config import ServerConfig
from tests.serving.conftest import LiveServer
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_limits import status, talk

USER = {"authorization": "Bearer user-key"}
ADMIN = {"authorization": "Bearer admin-key"}


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(api_key="user-key", admin_api_key="admin-key")


@pytest.mark.row(5)
def test_every_route_but_the_open_ones_needs_a_key(client: TestClient) -> None:
    for method, path, _ in ROUTES:
        response = client.request(method, path)
        assert (response.status_code == 401) == (path not in OPEN_PATHS), path
    assert client.get("/nowhere").status_code == 401
    assert client.get("/v1/models", headers=USER).status_code == 200


@pytest.mark.row(5)
@pytest.mark.parametrize(
    "line",
    [b"GET /v1/models HTTP/1.1\r\nHost: x/health?", b"GET http://x/v1/models HTTP/1.1\r\nHost: x",
     b"GET //v1/models HTTP/1.1\r\nHost: x", b"GET /v1/../health HTTP/1.1\r\nHost: x",
     b"GET /health/../v1/models HTTP/1.1\r\nHost: x",
     b"GET /health%2f..%2fv1/models HTTP/1.1\r\nHost: x",
     b"GET /%2e%2e/v1/models HTTP/1.1\r\nHost: x", b"GET /V1/MODELS HTTP/1.1\r\nHost: x",
     b"GET /HEALTH HTTP/1.1\r\nHost: x", b"GET /health; HTTP/1.1\r\nHost: x"],
)  # fmt: skip
def test_no_spelling_of_a_path_gets_around_the_key(live: LiveServer, line: bytes) -> None:
    received = talk(live, line + b"\r\n\r\n")
    assert status(received) in (400, 401, 404)
    assert b"shift-1" not in received


@pytest.mark.row(6)
@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer user-ke", "Bearer user-key ", "Bearer user-keyx",
     "Basic user-key",
     "user-key", "Bearer  user-key", "Bearer USER-KEY", "Bearer caf\u00e9"],
)  # fmt: skip
def test_wrong_keys_are_a_401(client: TestClient, value: str) -> None:
    response = client.get("/v1/models", headers={"authorization": value.encode("latin-1")})  # type: ignore[dict-item]
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.row(6)
def test_two_authorization_headers_are_a_401(client: TestClient) -> None:
    two = [("authorization", "Bearer user-key"), ("authorization", "Bearer x")]
    assert client.get("/v1/models", headers=two).status_code == 401


@pytest.mark.row(7)
def test_loading_needs_the_admin_key(client: TestClient) -> None:
    for path in ("/v1/unload_lora_adapter", "/unload_lora_adapter", "/v1/load_lora_adapter"):
        body = {"lora_name": "shift-1", "lora_path": "/x"}
        assert client.post(path, json=body, headers=USER).status_code == 403
    body = {"lora_name": "shift-1"}
    assert client.post("/v1/unload_lora_adapter", json=body, headers=ADMIN).status_code == 200
    assert client.get("/v1/models", headers=ADMIN).status_code == 200


def test_one_key_alone_opens_what_it_says(engine: FakeEngine) -> None:
    body = {"lora_name": "nobody"}
    with TestClient(create_app(engine, ServerConfig(api_key="user-key"))) as client:
        assert client.get("/v1/models").status_code == 401
        response = client.post("/v1/unload_lora_adapter", json=body, headers=USER)
        assert response.status_code == 404


def test_an_admin_key_alone_leaves_the_rest_open(engine: FakeEngine) -> None:
    body = {"lora_name": "nobody"}
    with TestClient(create_app(engine, ServerConfig(admin_api_key="admin-key"))) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/unload_lora_adapter", json=body).status_code == 401
        response = client.post("/v1/unload_lora_adapter", json=body, headers=ADMIN)
        assert response.status_code == 404
