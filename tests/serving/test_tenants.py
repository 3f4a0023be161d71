"""Whose account a request goes to, and with which priority: as sent, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.app import create_app
from serving.config import ServerConfig
from tests.serving.fake_engine import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "a"}]}
BOTH = [("/v1/completions", {"prompt": "abc"}), ("/v1/chat/completions", CHAT)]


def post(
    engine: FakeEngine, tenant_from: str, path: str, body: dict[str, Any], headers: Any = None
) -> Any:
    app = create_app(engine, ServerConfig(tenant_from=tenant_from))
    with TestClient(app) as client:
        return client.post(path, json=body, headers=headers)


@pytest.mark.parametrize(("path", "body"), BOTH)
@pytest.mark.parametrize(
    ("tenant_from", "fields", "headers", "standing"),
    [
        ("adapter", {}, {}, (0, None)),
        ("adapter", {"priority": -3, "user": "me"}, {"x-sloraj-tenant": "team"}, (-3, None)),
        ("user", {"user": "me", "priority": None}, {"x-sloraj-tenant": "team"}, (0, "me")),
        ("user", {}, {"x-sloraj-tenant": "team"}, (0, None)),
        ("header", {"priority": 2**31 - 1}, {"x-sloraj-tenant": "team"}, (2**31 - 1, "team")),
        ("header", {"user": "me"}, {}, (0, None)),
    ],
)
def test_the_tenant_is_what_the_server_was_told_to_look_at(
    engine: FakeEngine, path: str, body: dict[str, Any], tenant_from: str, fields: dict[str, Any],
    headers: dict[str, str], standing: tuple[int, str | None],
) -> None:  # fmt: skip
    assert post(engine, tenant_from, path, {**body, **fields}, headers).status_code == 200
    assert engine.standings == [standing]


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_the_objective_for_the_first_token_is_passed_on(
    engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    with TestClient(create_app(engine, ServerConfig())) as client:
        for slo_s in (2.5, 1, None):
            sent = {**body, "first_token_slo_s": slo_s}
            assert client.post(path, json=sent).status_code == 200
    assert engine.slos_s == [2.5, 1.0, None]


@pytest.mark.row(15)
@pytest.mark.parametrize(("path", "body"), BOTH)
@pytest.mark.parametrize("user", ["", "x" * 257, "two\nlines"])
def test_a_user_that_cannot_be_an_account_is_refused(
    engine: FakeEngine, path: str, body: dict[str, Any], user: str
) -> None:
    response = post(engine, "user", path, {**body, "user": user})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "user")
    assert engine.submitted == []


@pytest.mark.row(15)
@pytest.mark.parametrize(
    "headers",
    [[("x-sloraj-tenant", "")], [("x-sloraj-tenant", "x" * 257)],
     [("x-sloraj-tenant", "a"), ("x-sloraj-tenant", "b")]],
)  # fmt: skip
def test_a_header_that_cannot_be_an_account_is_refused(
    engine: FakeEngine, headers: list[tuple[str, str]]
) -> None:
    response = post(engine, "header", *BOTH[0], headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-sloraj-tenant")
    assert engine.submitted == []
