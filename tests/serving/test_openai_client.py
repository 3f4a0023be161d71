"""The official client against a real server: what it parses, what it raises, and how often it
tries.
"""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.serving.conftest import LiveServer, wait_until
from tests.serving.fake_engine import FakeEngine, expected_text

pytestmark = pytest.mark.row(24)
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def api(live: LiveServer):  # type: ignore[no-untyped-def]
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as api:
        yield api


def test_models_are_listed_and_retrieved(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["fake-base", "shift-1", "team/shift-2"]
    card = api.models.retrieve("team/shift-2")
    assert card.id == "team/shift-2" and card.owned_by
    assert card.model_extra and card.model_extra["parent"] == "fake-base"
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_completions_whole_and_streamed_say_the_same(api: openai.OpenAI) -> None:
    whole = api.completions.create(model="shift-1", prompt="abc", max_tokens=7, logprobs=1)
    assert whole.choices[0].text == expected_text("abc", 7, shift=1)
    assert whole.choices[0].logprobs and whole.choices[0].logprobs.text_offset == list(range(7))
    assert whole.usage and whole.usage.completion_tokens == 7
    assert whole._request_id
    parts = api.completions.create(
        model="shift-1",
        prompt="abc",
        max_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(parts)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_chats_whole_and_streamed_say_the_same(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(
        model="shift-1", messages=MESSAGES, max_completion_tokens=6, logprobs=True, top_logprobs=1
    )
    content = whole.choices[0].message.content
    assert content == expected_text("user:hi>", 6, shift=1)
    assert whole.choices[0].logprobs and len(whole.choices[0].logprobs.content or []) == 6
    stream = api.chat.completions.create(
        model="shift-1", messages=MESSAGES, max_completion_tokens=6, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == content


def test_the_async_client_runs_many_at_once(live: LiveServer, engine: FakeEngine) -> None:
    engine.token_delay_s = 0.01

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as api:

            async def ask(shift: int) -> str:
                model = ["fake-base", "shift-1", "team/shift-2"][shift]
                stream = await api.completions.create(
                    model=model, prompt="abc", max_tokens=12, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(ask(index % 3) for index in range(30)))

    texts = asyncio.run(ask_all())
    assert texts == [expected_text("abc", 12, shift=index % 3) for index in range(30)]
    wait_until(lambda: engine.num_running == 0, 1)


def test_leaving_a_stream_early_frees_the_request(api: openai.OpenAI, engine: FakeEngine) -> None:
    engine.token_delay_s = 0.02
    with api.completions.create(
        model="fake-base", prompt="a", max_tokens=200, stream=True
    ) as stream:
        next(iter(stream))
    wait_until(lambda: engine.num_running == 0)
    wait_until(lambda: bool(engine.aborted), 1)


def test_errors_are_the_clients_own_types(api: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        api.completions.create(model="fake-base", prompt="a", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="nobody", messages=MESSAGES)
    engine.fail_after = 1
    with pytest.raises(openai.APIError, match="not finite"):
        list(api.completions.create(model="fake-base", prompt="a", stream=True))


def test_a_deterministic_fault_is_not_tried_again_and_a_full_queue_is(
    api: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.fail_after = 0
    with pytest.raises(openai.InternalServerError):
        api.completions.create(model="fake-base", prompt="a")
    assert len(engine.submitted) == 1
    engine.submitted.clear()
    engine.fail_after, engine.max_waiting, engine.retry_after_s = None, 0, 0.01
    with pytest.raises(openai.InternalServerError):
        api.with_options(max_retries=1).completions.create(model="fake-base", prompt="a")
    assert len(engine.submitted) == 2
