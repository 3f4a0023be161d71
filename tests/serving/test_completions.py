"""Bodies of /v1/completions: what comes back for what was asked, against answers worked out by
hand.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serving.fake_engine import FakeEngine, expected_text


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_base_answers_when_no_model_is_named(client: TestClient) -> None:
    answer = complete(client, prompt="abc", max_tokens=5)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "fake-base"
    assert answer["system_fingerprint"] == "base"
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "abcab",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 4,  # <s> and three bytes
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("model", "shift"),
    [("shift-1", 1), ("team/shift-2", 2), ("fake-base:shift-1", 1), ("fake-base", 0)],
)
def test_model_names_the_adapter_that_answers(client: TestClient, model: str, shift: int) -> None:
    response = client.post("/v1/completions", json={"model": model, "prompt": "abc"})
    answer = response.json()
    assert answer["choices"][0]["text"] == expected_text("abc", 16, shift=shift)
    assert answer["model"] == model
    version = response.headers.get("x-sloraj-adapter-version")
    assert (version is not None) == (shift > 0)
    assert answer["system_fingerprint"] == (version or "base")


def test_choices_of_every_prompt_are_numbered_through(client: TestClient) -> None:
    answer = complete(client, prompt=["abc", "xy"], n=2, max_tokens=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["abc", "bca", "xyx", "yxy"]
    assert answer["usage"]["prompt_tokens"] == 4 + 3
    assert answer["usage"]["completion_tokens"] == 12


def test_token_id_prompts_reach_the_engine_unchanged(
    client: TestClient, engine: FakeEngine
) -> None:
    complete(client, prompt=[97, 98], max_tokens=1)
    complete(client, prompt=[[97], [98, 99]], max_tokens=1)
    assert [ids for _, ids, _, _ in engine.submitted] == [[97, 98], [97], [98, 99]]


def test_echo_puts_the_prompt_before_the_text(client: TestClient) -> None:
    assert complete(client, prompt="abc", echo=True, max_tokens=2)["choices"][0]["text"] == "abcab"
    ids = complete(client, prompt=[97, 98], echo=True, max_tokens=2)
    assert ids["choices"][0]["text"] == "abab"


def test_logprobs_are_parallel_lists_of_finite_numbers(client: TestClient) -> None:
    answer = complete(client, prompt="ab", max_tokens=3, logprobs=2)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b", "a"],
        "token_logprobs": [0.0, 0.0, 0.0],
        "top_logprobs": [{"a": 0.0, "b": -1.0}, {"b": 0.0, "c": -1.0}, {"a": 0.0, "b": -1.0}],
        "text_offset": [0, 1, 2],
    }
    assert all(math.isfinite(value) for value in logprobs["token_logprobs"])


def test_token_ids_come_when_asked_for(client: TestClient) -> None:
    answer = complete(client, prompt="ab", max_tokens=2, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == [97, 98]


def test_null_means_not_given(client: TestClient, engine: FakeEngine) -> None:
    complete(client, prompt="ab", max_tokens=None, stop=None, seed=None, stream_options=None,
             temperature=None, n=None, logit_bias=None, best_of=None, model=None)  # fmt: skip
    _, _, params, adapter_id = engine.submitted[0]
    assert (params.max_tokens, params.temperature, params.n, params.stop) == (16, 1.0, 1, ())
    assert adapter_id is None


def test_every_sampling_field_reaches_the_engine(client: TestClient, engine: FakeEngine) -> None:
    complete(
        client, prompt="ab", max_tokens=9, min_tokens=2, temperature=0.5, top_k=7, top_p=0.25,
        min_p=0.125, presence_penalty=-1, frequency_penalty=1.5, repetition_penalty=2, seed=-3, n=2,
        logit_bias={"65": -100, "66": 1.5}, logprobs=1, stop=["x", "yz"], stop_token_ids=[5],
        include_stop_str_in_output=True, ignore_eos=True,
    )  # fmt: skip
    params = engine.submitted[0][2]
    assert (params.max_tokens, params.min_tokens, params.n, params.seed) == (9, 2, 2, -3)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.5, 7, 0.25, 0.125)
    assert (params.presence_penalty, params.frequency_penalty) == (-1.0, 1.5)
    assert params.repetition_penalty == 2.0
    assert params.logit_bias == ((65, -100.0), (66, 1.5))
    assert (params.logprobs, params.stop, params.stop_token_ids) == (1, ("x", "yz"), (5,))
    assert params.include_stop_str_in_output and params.ignore_eos


@pytest.mark.row(12)
def test_temperature_and_seed_are_passed_on_exactly(client: TestClient, engine: FakeEngine) -> None:
    first = complete(client, prompt="ab", temperature=0, seed=7)
    again = complete(client, prompt="ab", temperature=0, seed=7)
    complete(client, prompt="ab", temperature=1e-6)
    assert first["choices"] == again["choices"]
    zero, same, tiny = (params for _, _, params, _ in engine.submitted)
    assert zero == same
    assert zero.is_greedy and zero.seed == 7
    assert tiny.temperature == 1e-6


def test_the_request_id_is_echoed_or_made(client: TestClient) -> None:
    body = {"prompt": "a"}
    given = client.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = client.post("/v1/completions", json=body)
    assert made.json()["id"] == f"cmpl-{made.headers['x-request-id']}"
    refused = client.post("/v1/completions", json=body, headers={"x-request-id": "a b\tc"})
    assert refused.headers["x-request-id"] != "a b\tc"
    assert client.get("/nowhere").headers["x-request-id"]


def test_nothing_runs_after_an_answer(client: TestClient, engine: FakeEngine) -> None:
    complete(client, prompt=["abc", "de"], n=2)
    assert engine.num_running == 0
    assert engine.aborted == []
    assert client.get("/health").json()["running_requests"] == 0
