"""Adapters that come, change and go, and clients that leave, while streams run."""

from __future__ import annotations

import concurrent.futures
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from checkpoints.demo.tasks import TASKS, prompt
from tests.e2e.served import BASE, Served, wait_until
from tests.e2e.streams import LONG, NUM_CHOICES, Stream

TEXT = "hello world"
NAME = "tenant/one"


def load(demo: Served, name: str, folder: str, **fields: Any) -> httpx2.Response:
    body = {"lora_name": name, "lora_path": folder, **fields}
    return demo.http.post(f"{demo.url}/v1/load_lora_adapter", json=body)


def unload(demo: Served, name: str) -> httpx2.Response:
    return demo.http.post(f"{demo.url}/v1/unload_lora_adapter", json={"lora_name": name})


def ask(demo: Served, model: str) -> httpx2.Response:
    body = {"model": model, "prompt": prompt(TEXT), "max_tokens": 64, "temperature": 0}
    return demo.http.post(f"{demo.url}/v1/completions", json=body)


def answer(demo: Served, model: str) -> str:
    asked = ask(demo, model)
    assert asked.status_code == 200, asked.text
    return str(asked.json()["choices"][0]["text"])


@pytest.fixture
def tenant(demo: Served) -> Iterator[str]:
    """An adapter loaded at run time: a copy of shift-3 under a name of its own."""
    demo.copy_of("shift-3", "one")
    assert load(demo, NAME, "one").status_code == 200
    yield NAME
    if NAME in _listed(demo):
        assert unload(demo, NAME).status_code == 200
    demo.wait_idle()


def _listed(demo: Served) -> list[str]:
    return [card["id"] for card in demo.http.get(f"{demo.url}/v1/models").json()["data"]]


def test_an_adapter_loaded_at_run_time_answers_and_is_listed(demo: Served, tenant: str) -> None:
    assert answer(demo, tenant) == TASKS["shift-3"].answer(TEXT)
    assert tenant in _listed(demo)
    assert demo.http.get(f"{demo.url}/v1/models/{tenant}").json()["root"] == str(demo.root / "one")


@pytest.mark.row(35)
def test_a_stream_ends_on_the_weights_it_began_with_while_the_name_gets_new_ones(
    demo: Served, tenant: str
) -> None:
    with Stream(demo, tenant, TEXT, **LONG) as before:
        pass
    demo.copy_of("reverse", "one")
    with Stream(demo, tenant, TEXT, **LONG) as stream:
        reloaded = load(demo, tenant, "one", load_inplace=True)
        assert reloaded.status_code == 200
        new = ask(demo, tenant)
        assert not stream.ended, "the stream was too short to tell"
    assert new.json()["choices"][0]["text"] == TASKS["reverse"].answer(TEXT)
    assert new.headers["x-sloraj-adapter-version"] == reloaded.json()["version"] != stream.version
    assert stream.version == before.version
    assert stream.texts == before.texts
    assert all(text.startswith(TASKS["shift-3"].answer(TEXT)) for text in stream.texts)
    assert stream.finish_reasons == ["length"] * NUM_CHOICES


@pytest.mark.row(35)
def test_a_taken_name_is_not_loaded_again_unasked_but_a_path_may_have_two_names(
    demo: Served, tenant: str
) -> None:
    assert load(demo, tenant, "one").status_code in (400, 409)
    assert load(demo, "tenant/two", "one").status_code == 200
    try:
        assert answer(demo, "tenant/two") == answer(demo, tenant)
    finally:
        assert unload(demo, "tenant/two").status_code == 200
    assert answer(demo, tenant) == TASKS["shift-3"].answer(TEXT)


@pytest.mark.row(36)
def test_an_unload_refuses_new_requests_and_waits_for_the_running_one(
    demo: Served, tenant: str
) -> None:
    versions = demo.engine("num_adapter_versions")
    with Stream(demo, tenant, TEXT, **LONG) as before:
        pass
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with Stream(demo, tenant, TEXT, **LONG) as stream:
            unloading = pool.submit(unload, demo, tenant)
            wait_until(lambda: ask(demo, tenant).status_code == 404, what="new requests get 404")
            assert unload(demo, tenant).status_code == 404
            assert load(demo, tenant, "one").status_code == 409
            assert not stream.ended, "the stream was too short to tell"
            assert not unloading.done()
        assert unloading.result(20).status_code == 200
    assert stream.texts == before.texts
    assert stream.finish_reasons == ["length"] * NUM_CHOICES
    # shift-3 itself has the same content and stays
    assert demo.engine("num_adapter_versions") == versions
    assert unload(demo, tenant).status_code == 404
    assert load(demo, tenant, "one").status_code == 200
    assert answer(demo, tenant) == TASKS["shift-3"].answer(TEXT)


@pytest.mark.row(34)
def test_nothing_is_loaded_from_elsewhere(demo: Served) -> None:
    (demo.root / "out").unlink(missing_ok=True)
    (demo.root / "out").symlink_to("/etc")
    for path in ("/etc", "../loadable/../..", "out"):
        assert load(demo, "tenant/thief", path).status_code == 400
    assert load(demo, BASE, "one").status_code == 400
    assert load(demo, "tenant/thief", "nothing-here").status_code == 404


@pytest.mark.row(20)
@pytest.mark.parametrize("is_stream", [True, False], ids=["streamed", "whole"])
def test_clients_that_leave_free_all_they_held(demo: Served, is_stream: bool) -> None:
    aborted = demo.engine("aborted_requests")
    body = {**LONG, "model": "double", "prompt": prompt(TEXT), "stream": is_stream}
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    peers = [socket.create_connection(("127.0.0.1", demo.port)) for _ in range(4)]
    for peer in peers:  # the first runs, the others wait for rows
        peer.sendall(head.encode() + data)
    wait_until(lambda: demo.engine("num_requests") == 4, what="all are in the engine")
    if is_stream:
        assert peers[0].recv(64)
    for peer in peers:
        peer.close()
    demo.wait_idle()
    assert demo.engine("aborted_requests") == aborted + 4
    assert answer(demo, "double") == TASKS["double"].answer(TEXT)
