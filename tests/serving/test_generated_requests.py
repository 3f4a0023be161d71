"""Requests made up by the machine: each is understood or refused by name, whatever its fields
hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.adapter_schemas import parse_load, parse_unload
from serving.errors import BadRequest, describe
from serving.schemas import (
    GenerationRequest,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from serving.strict_json import parse_object
from sloraj.errors import InvalidRequest
from sloraj.messages import Generate
from tests.serving.fake_engine import MODEL_INFO

FIELDS = (
    "prompt", "messages", "model", "lora_path", "lora_name", "max_tokens", "max_completion_tokens",
    "temperature", "top_p", "top_k", "min_p", "n", "best_of", "stop", "stop_token_ids", "logprobs",
    "top_logprobs", "logit_bias", "seed", "stream", "stream_options", "echo", "suffix", "tools",
    "tool_choice", "response_format", "presence_penalty", "repetition_penalty", "min_tokens",
    "ignore_eos", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "tokens", "load_inplace", "pinned", "add_special_tokens", "return_token_ids", "guided_json",
    "unknown",
)  # fmt: skip
PARSERS: tuple[Callable[[dict[str, Any]], Any], ...] = (
    lambda values: parse_completion(values, MODEL_INFO, 256),
    lambda values: parse_chat(values, MODEL_INFO),
    parse_tokenize,
    lambda values: parse_detokenize(values, MODEL_INFO),
    lambda values: parse_load(values, "base"),
    parse_unload,
)

plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**39, "user", "true", ""])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "pope"]) | plain, "content": plain}
)
values = st.recursive(
    plain | message,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
valid_bases = st.sampled_from(
    [{}, {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}, {"tokens": [1]},
     {"lora_name": "x", "lora_path": "y"}]
)  # fmt: skip


@pytest.mark.row(23)
@settings(max_examples=100, deadline=None)
@given(base=valid_bases, changed=st.dictionaries(st.sampled_from(FIELDS), values, max_size=4))
def test_every_request_is_understood_or_refused_by_field(
    base: dict[str, Any], changed: dict[str, Any]
) -> None:
    for parse in PARSERS:
        try:
            parsed = parse({**base, **changed})
        except InvalidRequest as exc:
            assert exc.param and exc.message
            assert len(exc.message) < 4000
            assert "\n" not in exc.message
            assert describe(exc).status == 400
        else:
            check_crossing(parsed)


def check_crossing(parsed: Any) -> None:
    """Whatever is accepted can cross to the engine, whose integers have 64 bits."""
    if isinstance(parsed, GenerationRequest):
        params = {name: getattr(parsed.params, name) for name in parsed.params.__slots__}
        msgspec.msgpack.encode(Generate(request_id="r", prompt_token_ids=[1], params=params))


@pytest.mark.row(23)
@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8")))
def test_every_body_is_an_object_or_a_bad_request(body: bytes) -> None:
    for candidate in (body, b"{" + body + b"}", b'{"a": ' + body + b"}"):
        try:
            assert isinstance(parse_object(candidate), dict)
        except BadRequest as exc:
            assert exc.message.startswith("body: ")
