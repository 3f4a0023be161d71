"""Well-formed JSON with wrong values: 400, the field named, the value shown short, the bounds
told.
"""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serving.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine

PROMPT = {"prompt": "abc"}


def refusal(
    client: TestClient, body: dict[str, Any], path: str = "/v1/completions"
) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert len(response.content) < 4000
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.row(9)
@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [-1], [VOCAB_SIZE], ["a", 1], [1, "a"], [[1], "a"], [[1], []], [[1, -5]],
     ["a", ""],
     [True], [1.5], None, 5, {"a": 1}, ["a"] * 257],
)  # fmt: skip
def test_prompts_that_are_none_are_refused(
    client: TestClient, engine: FakeEngine, prompt: Any
) -> None:
    error = refusal(client, {"prompt": prompt})
    assert error["param"] == "prompt"
    assert error["message"].startswith("prompt: got ")
    assert engine.submitted == []


@pytest.mark.row(9)
def test_a_prompt_beyond_the_context_says_so(client: TestClient) -> None:
    for prompt in ("x" * 1_000_000, [1] * MAX_MODEL_LEN):
        error = refusal(client, {"prompt": prompt})
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "prompt"


@pytest.mark.row(10)
@pytest.mark.parametrize("max_tokens", [0, -1, 1.5, "5", True, [5], -(2**63)])
def test_max_tokens_must_be_a_positive_integer(client: TestClient, max_tokens: Any) -> None:
    assert refusal(client, {**PROMPT, "max_tokens": max_tokens})["param"] == "max_tokens"
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for name in ("max_tokens", "max_completion_tokens"):
        error = refusal(client, {**chat, name: max_tokens}, "/v1/chat/completions")
        assert error["param"] == name


@pytest.mark.row(10)
@pytest.mark.parametrize("max_tokens", [2**63, 10**30, MAX_MODEL_LEN])
def test_max_tokens_beyond_the_context_is_cut_to_it(client: TestClient, max_tokens: int) -> None:
    answer = client.post("/v1/completions", json={**PROMPT, "max_tokens": max_tokens}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.row(10)
def test_max_tokens_not_given_is_sixteen_or_for_chat_the_context(
    client: TestClient, engine: FakeEngine
) -> None:
    client.post("/v1/completions", json={**PROMPT, "max_tokens": None})
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert [params.max_tokens for _, _, params, _ in engine.submitted] == [16, None]


@pytest.mark.row(11)
@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", 1e30), ("temperature", "hot"), ("temperature", True),
     ("temperature", 10**39), ("top_p", 0), ("top_p", 2), ("top_p", -0.1), ("min_p", 1.1),
     ("top_k", -2),
     ("top_k", 1.5), ("top_k", False), ("presence_penalty", 99), ("frequency_penalty", -99),
     ("repetition_penalty", 0), ("repetition_penalty", 99), ("min_tokens", -1), ("min_tokens", 99),
     ("seed", 2**63), ("seed", 1.0), ("seed", "1"), ("ignore_eos", 1), ("echo", "yes"),
     ("stop_token_ids", [-1]), ("stop_token_ids", [VOCAB_SIZE]), ("stop_token_ids", 5)],
)  # fmt: skip
def test_sampling_values_out_of_range_are_refused(
    client: TestClient, engine: FakeEngine, field: str, value: Any
) -> None:
    error = refusal(client, {**PROMPT, field: value})
    assert error["param"] == field
    assert field in error["message"] and "allowed: " in error["message"]
    assert engine.submitted == []


@pytest.mark.row(13)
@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 0), ("n", 10**6), ("n", True), ("best_of", 2), ("stop", ""), ("stop", ["a"] * 1000),
     ("stop", [""]), ("stop", [1]), ("logit_bias", {"x": 1}), ("logit_bias", {str(VOCAB_SIZE): 1}),
     ("logit_bias", {"-1": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": "a"}),
     ("logit_bias", {"1": True}), ("logit_bias", [1]), ("logit_bias", {"²": 1}),
     ("logit_bias", {str(i): 1 for i in range(301)})],
)  # fmt: skip
def test_choices_stops_and_biases_out_of_range_are_refused(
    client: TestClient, field: str, value: Any
) -> None:
    assert refusal(client, {**PROMPT, field: value})["param"] == field


@pytest.mark.row(13)
def test_best_of_one_is_accepted(client: TestClient) -> None:
    assert client.post("/v1/completions", json={**PROMPT, "best_of": 1}).status_code == 200


@pytest.mark.row(14)
@pytest.mark.parametrize("logprobs", [-1, 10**6, "x", True, 1.5])
def test_logprobs_must_be_a_small_integer(client: TestClient, logprobs: Any) -> None:
    assert refusal(client, {**PROMPT, "logprobs": logprobs})["param"] == "logprobs"


@pytest.mark.row(14)
@pytest.mark.parametrize(
    ("fields", "param"),
    [({"top_logprobs": 2}, "top_logprobs"),
     ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
     ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"), ({"logprobs": 5}, "logprobs"),
     ({"logprobs": True, "top_logprobs": 21}, "top_logprobs")],
)  # fmt: skip
def test_chat_top_logprobs_need_logprobs(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], **fields}
    assert refusal(client, body, "/v1/chat/completions")["param"] == param


@pytest.mark.row(15)
def test_stream_options_without_stream_are_refused(client: TestClient) -> None:
    error = refusal(client, {**PROMPT, "stream_options": {"include_usage": True}})
    assert error["param"] == "stream_options"
    wrong = {**PROMPT, "stream": True, "stream_options": {"include_usage": 1}}
    assert refusal(client, wrong)["param"] == "stream_options"


@pytest.mark.row(15)
def test_unknown_fields_are_ignored_and_lora_path_must_agree(client: TestClient) -> None:
    body = {**PROMPT, "model": "shift-1", "no_such_field": {"deep": [1]}}
    assert client.post("/v1/completions", json=body).status_code == 200
    for model in ("shift-1", "fake-base:shift-1"):
        agreeing = {**PROMPT, "model": model, "lora_path": "shift-1"}
        assert client.post("/v1/completions", json=agreeing).status_code == 200
    error = refusal(client, {**PROMPT, "model": "shift-1", "lora_path": "team/shift-2"})
    assert error["param"] == "lora_path"


@pytest.mark.row(15)
@pytest.mark.parametrize(
    ("field", "value"),
    [("priority", 1.5), ("priority", "1"), ("priority", True), ("priority", 2**31),
     ("priority", -(2**31)), ("priority", [0]), ("user", 7), ("user", ["me"]),
     ("first_token_slo_s", 0), ("first_token_slo_s", -1), ("first_token_slo_s", "1"),
     ("first_token_slo_s", True), ("first_token_slo_s", 1e6)],
)  # fmt: skip
def test_a_standing_of_the_wrong_kind_is_refused(
    client: TestClient, engine: FakeEngine, field: str, value: Any
) -> None:
    assert refusal(client, {**PROMPT, field: value})["param"] == field
    chat = {"messages": [{"role": "user", "content": "a"}], field: value}
    assert refusal(client, chat, "/v1/chat/completions")["param"] == field
    assert engine.submitted == []


@pytest.mark.row(16)
@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "x"), ("tools", [{"type": "function"}]), ("tool_choice", "required"),
     ("response_format", {"type": "json_object"}), ("guided_json", {}),
     ("structured_outputs", {"json": {}}),
     ("prompt_logprobs", 1), ("chat_template", "{{ x }}"), ("truncate_prompt_tokens", 5)],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_not_dropped(
    client: TestClient, field: str, value: Any
) -> None:
    if field == "guided_json":
        value = {"type": "object"}
    assert refusal(client, {**PROMPT, field: value})["param"] == field


def test_at_most_ten_problems_are_told_and_values_are_cut(client: TestClient) -> None:
    wrong = {str(VOCAB_SIZE + i): 1 for i in range(300)}
    error = refusal(client, {**PROMPT, "logit_bias": wrong, "temperature": "x" * 100_000})
    assert error["message"].count("; logit_bias: ") <= 10
    assert "and 291 more" in error["message"]
