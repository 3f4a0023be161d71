"""Model names: the list, single cards, and names that are none."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.adapter_schemas import is_adapter_name
from tests.serving.conftest import wait_until
from tests.serving.fake_engine import FakeEngine


def test_the_base_is_row_zero_and_the_parent_of_the_rest(client: TestClient) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["fake-base", "shift-1", "team/shift-2"]
    assert [card["parent"] for card in cards] == [None, "fake-base", "fake-base"]
    for card in cards:
        assert card["object"] == "model" and card["owned_by"]
        assert isinstance(card["created"], int) and card["root"]


@pytest.mark.parametrize("name", ["fake-base", "shift-1", "team/shift-2", "team%2Fshift-2"])
def test_every_listed_model_can_be_retrieved(client: TestClient, name: str) -> None:
    response = client.get(f"/v1/models/{name}")
    assert response.status_code == 200
    assert response.json()["id"] == name.replace("%2F", "/")


def test_an_unknown_model_is_a_404_with_the_nearest_names(client: TestClient) -> None:
    asked = client.post("/v1/completions", json={"prompt": "a", "model": "shift-3"})
    retrieved = client.get("/v1/models/shift-3")
    for response in (asked, retrieved):
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'shift-1'" in error["message"]
        assert "2 adapters" in error["message"]


@pytest.mark.row(17)
def test_no_model_means_the_base(client: TestClient, engine: FakeEngine) -> None:
    assert client.post("/v1/completions", json={"prompt": "a"}).json()["model"] == "fake-base"
    assert engine.submitted[0][3] is None


@pytest.mark.row(17)
@pytest.mark.row(51)
@pytest.mark.parametrize(
    "name",
    ["", "../../etc", "..", "a/../b", "/etc/passwd", "a\0b", "a\nb", "a,b", "x" * 10_240, "😀",
     "team%2Fshift-2", "a b", "a:b", ":shift-1", "fake-base:", "fake-base:../x", "shift-1 ",
     "SHIFT-1"],
)  # fmt: skip
def test_names_that_are_none_are_refused_without_touching_a_file(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(os, "stat", _recording(os.stat, opened))
    monkeypatch.setattr("builtins.open", _recording(open, opened))
    response = client.post("/v1/completions", json={"prompt": "a", "model": name})
    monkeypatch.undo()
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert len(response.content) < 1000
    assert "\n" not in response.json()["error"]["message"]
    wait_until(lambda: engine.num_running == 0, 1)
    assert not [path for path in opened if isinstance(path, str) and name and name in path]


def _recording(function: Any, calls: list[Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return function(*args, **kwargs)

    return call


@pytest.mark.row(17)
@pytest.mark.parametrize("model", [5, True, ["shift-1"], {}])
def test_a_model_that_is_no_string_is_a_400(client: TestClient, model: Any) -> None:
    response = client.post("/v1/completions", json={"prompt": "a", "model": model})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


def test_the_name_grammar() -> None:
    for name in ("a", "A-1_b.c@d+e", "org/name", "x" * 256, "a..b", "..."):
        assert is_adapter_name(name), name
    for name in ("", "x" * 257, "/a", "a/..", "../a", "a,b", "a:b", "a b", "é", "a\n"):
        assert not is_adapter_name(name), name


@pytest.mark.row(40)
def test_ten_thousand_adapters_are_listed_and_scraped_in_bounds(
    client: TestClient, engine: FakeEngine
) -> None:
    for index in range(10_000):
        engine.add_adapter(f"tenant/{index:05}", state="on_host")
    start_s = time.process_time()
    listed = client.get("/v1/models")
    scraped = client.get("/metrics")
    unknown = client.post("/v1/completions", json={"prompt": "a", "model": "tenant/00012x"})
    assert time.process_time() - start_s < 1.5  # a bound on CPU, loose enough for a busy machine
    assert len(listed.json()["data"]) == 10_003
    assert len(scraped.content) < 1_000_000
    assert "'tenant/00012'" in unknown.json()["error"]["message"]
