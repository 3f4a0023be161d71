"""Server-sent events: every byte of a stream, and what an error does before and after the 200."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.replies import Choice, CompletionReply
from serving.sse import event
from tests.serving.conftest import wait_until
from tests.serving.fake_engine import FakeEngine


def stream(client: TestClient, path: str, **body: Any) -> bytes:
    response = client.post(path, json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    return response.content


def events(raw: bytes) -> list[Any]:
    """Parsed as strictly as the strictest client does: LF only, one data line an event, [DONE]
    last.
    """
    assert b"\r" not in raw
    assert raw.endswith(b"data: [DONE]\n\n")
    blocks = raw.removesuffix(b"\n\n").split(b"\n\n")
    assert all(block.startswith(b"data: ") and b"\n" not in block for block in blocks)
    return [json.loads(block.removeprefix(b"data: ")) for block in blocks[:-1]]


def test_a_completion_stream_is_exact_to_the_byte(client: TestClient) -> None:
    raw = stream(client, "/v1/completions", model="shift-1", prompt="ab", max_tokens=2)
    first = json.loads(raw.split(b"\n")[0].removeprefix(b"data: "))
    head = (
        f'{{"id":"{first["id"]}","object":"text_completion","created":{first["created"]},'
        f'"model":"shift-1","system_fingerprint":"{first["system_fingerprint"]}","choices":[{{"index":0,'
    )
    tail = ',"stop_reason":null}]}\n\n'
    assert raw.decode() == (
        f'data: {head}"text":"b","logprobs":null,"finish_reason":null{tail}'
        f'data: {head}"text":"c","logprobs":null,"finish_reason":"length"{tail}'
        "data: [DONE]\n\n"
    )


def test_a_chat_stream_starts_with_the_role_and_ends_with_the_reason(client: TestClient) -> None:
    messages = [{"role": "user", "content": "hi"}]
    raw = stream(client, "/v1/chat/completions", messages=messages, max_tokens=2)
    bodies = events(raw)
    assert {body["object"] for body in bodies} == {"chat.completion.chunk"}
    assert len({(body["id"], body["created"], body["model"]) for body in bodies}) == 1
    deltas = [body["choices"][0]["delta"] for body in bodies]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == "us"  # of "user:hi>"
    assert all("role" not in delta for delta in deltas[1:])
    reasons = [body["choices"][0]["finish_reason"] for body in bodies]
    assert reasons == [None, None, "length"]


def test_usage_comes_last_and_only_when_asked_for(client: TestClient) -> None:
    plain = events(stream(client, "/v1/completions", prompt="ab", max_tokens=2))
    assert all("usage" not in body and body["choices"] for body in plain)
    options = {"include_usage": True}
    asked = events(
        stream(client, "/v1/completions", prompt="ab", max_tokens=2, stream_options=options)
    )
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["total_tokens"] == 3 + 2
    assert all("usage" not in body for body in asked[:-1])


def test_continuous_usage_counts_up_on_every_chunk(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    bodies = events(
        stream(client, "/v1/completions", prompt="ab", max_tokens=3, stream_options=options)
    )
    assert [body["usage"]["completion_tokens"] for body in bodies] == [1, 2, 3, 3]


def test_each_choice_of_a_stream_is_whole(client: TestClient) -> None:
    bodies = events(
        stream(client, "/v1/completions", prompt=["abc", "xy"], n=2, max_tokens=3, echo=True)
    )
    texts = [""] * 4
    for body in bodies:
        texts[body["choices"][0]["index"]] += body["choices"][0]["text"]
    assert texts == ["abcabc", "abcbca", "xyxyx", "xyyxy"]


def test_streamed_logprobs_keep_their_place_in_the_text(client: TestClient) -> None:
    bodies = events(stream(client, "/v1/completions", prompt="ab", max_tokens=3, logprobs=0))
    offsets = [body["choices"][0]["logprobs"]["text_offset"] for body in bodies]
    assert offsets == [[0], [1], [2]]


def test_an_error_before_the_first_token_keeps_its_status(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.fail_after = 0
    response = client.post("/v1/completions", json={"prompt": "ab", "stream": True})
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    unknown = client.post(
        "/v1/completions", json={"prompt": "ab", "stream": True, "model": "nobody"}
    )
    assert unknown.status_code == 404


@pytest.mark.row(41)
def test_an_error_after_the_first_token_is_the_last_event(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.fail_after = 2
    bodies = events(stream(client, "/v1/completions", prompt="abc", max_tokens=5))
    assert [body["choices"][0]["text"] for body in bodies[:-1]] == ["a", "b"]
    assert bodies[-1] == {
        "error": {
            "message": "the row's logits are not finite",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }


def test_a_dying_engine_ends_streams_with_an_error(client: TestClient, engine: FakeEngine) -> None:
    engine.token_delay_s = 0.05
    request = client.stream("POST", "/v1/completions", json={"prompt": "ab", "stream": True})
    threading.Timer(0.12, engine.die, ["killed"]).start()
    with request as response:
        bodies = events(response.read())
    assert bodies[-1]["error"]["code"] == "engine_unavailable"


def test_events_hold_no_line_break_and_no_nan() -> None:
    assert event({"text": "a\nb\u2028c"}) == 'data: {"text":"a\\nb\u2028c"}\n\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        event({"logprob": float("nan")})


def test_a_fault_of_ours_in_mid_stream_is_told_without_its_text(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = CompletionReply._deltas

    def fail_at_the_second(self: CompletionReply, index: int, choice: Choice, output: Any) -> Any:
        if choice.has_started:
            raise ZeroDivisionError("secret")
        return told(self, index, choice, output)

    monkeypatch.setattr(CompletionReply, "_deltas", fail_at_the_second)
    engine.token_delay_s = 0.01
    bodies = events(stream(client, "/v1/completions", prompt="abc", max_tokens=5))
    assert len(bodies) == 2
    assert bodies[1]["error"]["code"] == "internal_error"
    assert "secret" not in bodies[1]["error"]["message"]
    wait_until(lambda: engine.num_running == 0, 1)


def test_a_fault_of_ours_before_it_is_a_500_without_its_text(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(engine, "submit", fail)
    response = client.post("/v1/completions", json={"prompt": "abc"})
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"]
    assert response.json()["error"]["code"] == "internal_error" and "secret" not in response.text
    assert client.get("/health").json()["running_requests"] == 0
