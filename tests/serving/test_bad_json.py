"""Bodies that are no JSON, or JSON that is meant to hurt: refused fast, and the server goes on."""

from __future__ import annotations

import time

import pytest
from starlette.testclient import TestClient

from serving.errors import BadRequest
from serving.strict_json import parse_object
from tests.serving.fake_engine import FakeEngine

JSON = {"content-type": "application/json"}
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/tokenize")

MALFORMED = {
    "empty": b"",
    "blank": b" \n",
    "open": b"{",
    "a list": b"[]",
    "null": b"null",
    "a string": b'"x"',
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "byte-order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "invalid utf-8": b'{"prompt": "\xff\xfe"}',
    "overlong utf-8": b'{"prompt": "\xc0\xaf"}',
    "duplicate key": b'{"prompt": "a", "prompt": "b"}',
    "duplicate key inside": b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "trailing text": b'{"prompt": "a"} x',
    "control character": b'{"prompt": "\n"}',
}

HOSTILE = {
    "depth of lists": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "depth of objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "unclosed depth": b"[" * 10_000,
    "digits": b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "negative digits": b'{"prompt": "a", "seed": -' + b"9" * 100_000 + b"}",
    "exponent": b'{"prompt": "a", "temperature": 1e400}',
    "long exponent": b'{"prompt": "a", "temperature": 1e' + b"9" * 10_000 + b"}",
    "quotes": b'{"prompt": ' + b"[" * 70 + b'\\"' * 500_000,
}


@pytest.mark.row(1)
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_bodies_are_refused(client: TestClient, engine: FakeEngine, kind: str) -> None:
    for path in PATHS:
        response = client.post(path, content=MALFORMED[kind], headers=JSON)
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["message"].startswith("body: ")
    assert engine.submitted == []
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.row(2)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bodies_are_refused_fast(client: TestClient, kind: str) -> None:
    start_s = time.process_time()
    response = client.post("/v1/completions", content=HOSTILE[kind], headers=JSON)
    assert response.status_code == 400
    assert len(response.content) < 500
    assert time.process_time() - start_s < 0.5  # 100 ms on a quiet machine; CPU time, not wall time
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_sixty_four_levels_are_allowed_and_no_more() -> None:
    assert parse_object(b'{"a":' * 63 + b"[]" + b"}" * 63)
    with pytest.raises(BadRequest, match="deeper than 64"):
        parse_object(b'{"a":' * 64 + b"[]" + b"}" * 64)


def test_brackets_inside_strings_are_not_depth() -> None:
    text = "[" * 500 + '\\"' + "{" * 500
    assert parse_object(f'{{"a": "{text}"}}'.encode()) == {"a": text.replace('\\"', '"')}


def test_ordinary_json_is_read_as_the_standard_parser_does() -> None:
    body = '{"a": [1, -2.5e3, true, false, null, "\\u00e9\\ud83d\\ude00 é"], "b": {}}'.encode()
    assert parse_object(body) == {"a": [1, -2500.0, True, False, None, "é😀 é"], "b": {}}
