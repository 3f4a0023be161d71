"""Loading and unloading over HTTP: what may be named, from where, and what a refusal leaves
behind.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.app import create_app
from sloraj.errors import AdapterLoadError
from tests.serving.conftest import LiveServer, wait_until, write_adapter
from tests.serving.fake_engine import FakeEngine, _failed

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def load(client: TestClient, name: Any, path: Any, **more: Any) -> Any:
    return client.post(LOAD, json={"lora_name": name, "lora_path": str(path), **more})


def names(client: TestClient) -> list[str]:
    return [card["id"] for card in client.get("/v1/models").json()["data"]]


def test_a_loaded_adapter_answers_and_an_unloaded_one_does_not(
    client: TestClient, adapters_dir: Path
) -> None:
    write_adapter(adapters_dir, "seven")
    loaded = load(client, "shift-7", adapters_dir / "seven", pinned=False)
    assert loaded.status_code == 200
    assert loaded.json()["status"] == "success"
    body = {"prompt": "a", "model": "shift-7", "max_tokens": 1}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "h"
    assert client.post(UNLOAD, json={"lora_name": "shift-7"}).status_code == 200
    assert client.post("/v1/completions", json=body).status_code == 404


def test_paths_may_be_relative_to_a_root(client: TestClient, adapters_dir: Path) -> None:
    write_adapter(adapters_dir, "seven")
    assert load(client, "shift-7", "seven").status_code == 200


def test_the_flat_form_lists_what_is_loaded(client: TestClient, adapters_dir: Path) -> None:
    path = write_adapter(adapters_dir, "seven")
    body = {"lora_name": "shift-7", "lora_path": str(path), "pinned": True}
    loaded = client.post("/load_lora_adapter", json=body)
    assert loaded.status_code == 200
    assert loaded.json()["success"] is True
    assert loaded.json()["loaded_adapters"]["shift-7"] == str(path)
    again = client.post("/load_lora_adapter", json=body)
    assert again.status_code == 400
    assert again.json()["success"] is False and "exists" in again.json()["error_message"]
    gone = client.post("/unload_lora_adapter", json={"lora_name": "shift-7"})
    assert gone.status_code == 200
    assert "shift-7" not in gone.json()["loaded_adapters"]


@pytest.mark.row(25)
def test_missing_files_are_404_and_wrong_ones_400(client: TestClient, adapters_dir: Path) -> None:
    before = names(client)
    no_config = adapters_dir / "no-config"
    no_config.mkdir()
    no_weights = write_adapter(adapters_dir, "no-weights")
    (no_weights / "adapter_model.safetensors").unlink()
    empty = write_adapter(adapters_dir, "empty")
    (empty / "adapter_model.safetensors").write_bytes(b"")
    nested = write_adapter(adapters_dir, "nested")
    (nested / "adapter_model.safetensors").unlink()
    (nested / "adapter_model.safetensors").mkdir()
    a_file = adapters_dir / "a-file"
    a_file.write_text("x")
    for path, status in (
        (adapters_dir / "missing", 404), (no_config, 404), (no_weights, 404), (empty, 400),
        (nested, 400), (a_file, 400),
    ):  # fmt: skip
        response = load(client, "x", path)
        assert response.status_code == status, (path, response.text)
        assert response.json()["error"]["param"] == "lora_path"
    assert names(client) == before
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.row(29)
def test_the_loaders_refusal_reaches_the_client_word_for_word(
    client: TestClient, engine: FakeEngine, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(adapters_dir, "odd")
    message = "adapter 'odd': 0 of 4 tensors match the model; first: 'x.lora_A.weight'"
    refuse = lambda *_, **__: _failed(AdapterLoadError(message, param="lora_path"))  # noqa: E731
    monkeypatch.setattr(engine, "load_adapter", refuse)
    response = load(client, "odd", "odd")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == message
    assert "odd" not in names(client)


@pytest.mark.row(34)
def test_nothing_outside_the_roots_can_be_loaded(
    client: TestClient, adapters_dir: Path, tmp_path: Path
) -> None:
    outside = write_adapter(tmp_path, "outside")
    (adapters_dir / "link").symlink_to(outside)
    (adapters_dir / "loop").symlink_to(adapters_dir / "loop")
    half = write_adapter(adapters_dir, "half")
    (half / "adapter_model.safetensors").unlink()
    (half / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for path in (outside, adapters_dir / "link", adapters_dir / "loop", half, "../outside", "/", "",
                 f"{adapters_dir}/../outside", "/etc/no-such-thing", "a\0b",
                 "x" * 5000):  # fmt: skip
        response = load(client, "x", path)
        assert response.status_code == 400, (path, response.text)
        assert len(response.content) < 1000


@pytest.mark.row(34)
def test_special_files_are_refused_without_being_opened(
    client: TestClient, adapters_dir: Path
) -> None:
    fifo = write_adapter(adapters_dir, "fifo")
    (fifo / "adapter_config.json").unlink()
    os.mkfifo(fifo / "adapter_config.json")
    os.mkfifo(adapters_dir / "fifo-itself")
    linked = write_adapter(adapters_dir, "linked")
    os.link(linked / "adapter_config.json", adapters_dir / "second-name")
    device = write_adapter(adapters_dir, "device")
    (device / "adapter_model.safetensors").unlink()
    (device / "adapter_model.safetensors").symlink_to("/dev/zero")
    start_s = time.monotonic()
    for path in (fifo, adapters_dir / "fifo-itself", linked, device):
        assert load(client, "x", path).status_code == 400, path
    assert time.monotonic() - start_s < 2


@pytest.mark.row(34)
@pytest.mark.parametrize(
    "name",
    ["fake-base", "", "../x", "/x", "a/../b", "a,b", "a b", "a:b", "x" * 257, None, 5, ["x"]],
)
def test_names_that_cannot_be_given_are_refused(
    client: TestClient, adapters_dir: Path, name: Any
) -> None:
    write_adapter(adapters_dir, "seven")
    response = load(client, name, "seven")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_name"


@pytest.mark.row(34)
def test_links_inside_a_root_are_followed(client: TestClient, adapters_dir: Path) -> None:
    write_adapter(adapters_dir, "blob")
    (adapters_dir / "snapshot").symlink_to(adapters_dir / "blob")
    assert load(client, "shift-7", "snapshot").status_code == 200


def test_without_a_root_nothing_can_be_loaded(engine: FakeEngine, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, "a")
    with TestClient(create_app(engine)) as client:
        response = load(client, "x", path)
    assert response.status_code == 400
    assert "--adapter-root" in response.json()["error"]["message"]


@pytest.mark.row(35)
def test_a_name_is_taken_once_and_a_path_as_often_as_wanted(
    client: TestClient, adapters_dir: Path
) -> None:
    write_adapter(adapters_dir, "seven")
    assert load(client, "shift-7", "seven").status_code == 200
    again = load(client, "shift-7", "seven")
    assert again.status_code == 400
    assert again.json()["error"]["code"] == "adapter_exists"
    assert load(client, "shift-8", "seven").status_code == 200


@pytest.mark.row(35)
def test_a_reload_in_place_changes_the_version_that_answers(
    client: TestClient, adapters_dir: Path
) -> None:
    write_adapter(adapters_dir, "seven")
    body = {"prompt": "a", "model": "shift-7"}
    first = load(client, "shift-7", "seven").json()["version"]
    assert client.post("/v1/completions", json=body).json()["system_fingerprint"] == first
    second = load(client, "shift-7", "seven", load_inplace=True).json()["version"]
    assert second != first
    answer = client.post("/v1/completions", json=body)
    assert answer.json()["system_fingerprint"] == second
    assert answer.headers["x-sloraj-adapter-version"] == second


@pytest.mark.row(36)
def test_unloading_waits_for_running_requests_and_turns_new_ones_away(
    live: LiveServer, engine: FakeEngine
) -> None:
    import httpx2

    engine.token_delay_s = 0.03
    answers: list[Any] = []
    body = {"prompt": "a", "model": "shift-1", "max_tokens": 20}

    def ask() -> None:
        answers.append(httpx2.post(f"{live.url}/v1/completions", json=body, timeout=20))

    running = threading.Thread(target=ask)
    running.start()
    wait_until(lambda: engine.num_running == 1)
    unloaded: list[Any] = []
    unload = threading.Thread(
        target=lambda: unloaded.append(
            httpx2.post(f"{live.url}{UNLOAD}", json={"lora_name": "shift-1"}, timeout=20)
        )
    )
    unload.start()
    wait_until(lambda: "shift-1" not in httpx2.get(f"{live.url}/v1/models").text)
    assert httpx2.post(f"{live.url}/v1/completions", json=body).status_code == 404
    assert unloaded == []
    running.join()
    unload.join()
    assert answers[0].json()["choices"][0]["text"] == "b" * 20
    assert unloaded[0].status_code == 200


@pytest.mark.row(36)
def test_unloading_what_is_not_loaded_is_a_404(client: TestClient) -> None:
    for name in ("nobody", "fake-base", "../x"):
        response = client.post(UNLOAD, json={"lora_name": name})
        assert response.status_code == 404
    assert client.post(UNLOAD, json={"lora_name": "shift-1"}).status_code == 200
    assert client.post(UNLOAD, json={"lora_name": "shift-1"}).status_code == 404
    for name in (None, "", 5):
        assert client.post(UNLOAD, json={"lora_name": name}).status_code == 400


@pytest.mark.row(36)
def test_a_load_and_an_unload_of_one_name_do_not_cross(
    live: LiveServer, engine: FakeEngine, adapters_dir: Path
) -> None:
    import httpx2

    write_adapter(adapters_dir, "seven")
    engine.load_delay_s = 0.4
    body = {"lora_name": "shift-7", "lora_path": "seven"}
    loads: list[int] = []
    thread = threading.Thread(
        target=lambda: loads.append(httpx2.post(f"{live.url}{LOAD}", json=body).status_code)
    )
    thread.start()
    wait_until(lambda: "shift-7" in engine._busy)
    crossing = httpx2.post(f"{live.url}{UNLOAD}", json={"lora_name": "shift-7"})
    assert crossing.status_code == 409
    assert crossing.json()["error"]["code"] == "adapter_busy"
    thread.join()
    assert loads == [200]
