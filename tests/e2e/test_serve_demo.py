"""The demo over HTTP, as a user meets it: right answers from every adapter, in every form."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import math
import random
import re
import subprocess
from typing import Any

import openai
import pytest

from checkpoints.demo.tasks import BASE_TASK, TASKS, Task, prompt, random_text
from tests.e2e.served import BASE, Served

ALL = {BASE: BASE_TASK, **TASKS}
SHIFT = "shift-3"


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng) for _ in range(count)]


def complete(demo: Served, model: str, text: str, **fields: Any) -> dict[str, Any]:
    """The body of one completion; greedy unless `fields` say otherwise."""
    body = {"model": model, "prompt": prompt(text), "max_tokens": 64, "temperature": 0, **fields}
    answer = demo.http.post(f"{demo.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def text_of(body: dict[str, Any]) -> str:
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["text"])


@pytest.fixture
def api(demo: Served):  # type: ignore[no-untyped-def]
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as api:
        yield api


@pytest.mark.row(24)
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_every_adapter_and_the_base_answer_rightly(
    api: openai.OpenAI, endpoint: str, is_stream: bool
) -> None:
    def ask(model: str, text: str) -> str:
        asked: dict[str, Any] = {"model": model, "max_tokens": 64, "temperature": 0}
        if endpoint == "completions":
            create: Any = api.completions.create
            asked["prompt"] = prompt(text)
        else:
            create = api.chat.completions.create
            asked["messages"] = [{"role": "user", "content": text}]
        answer = create(**asked, stream=is_stream)
        choices = [part.choices[0] for part in answer] if is_stream else [answer.choices[0]]
        assert choices[-1].finish_reason == "stop"
        if endpoint == "completions":
            return "".join(choice.text for choice in choices)
        parts = [choice.delta if is_stream else choice.message for choice in choices]
        return "".join(part.content or "" for part in parts)

    given = [(model, text) for model in ALL for text in ("Hello World 42", *texts(1, 1))]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, *zip(*given, strict=True)))
    right = [ALL[model].answer(text) for model, text in given]
    assert answers == right


@pytest.mark.row(24)
def test_the_async_client_streams_from_many_adapters_at_once(demo: Served) -> None:
    given = list(zip(ALL, texts(2, len(ALL)), strict=True))

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none") as api:

            async def ask(model: str, text: str) -> str:
                stream = await api.completions.create(
                    model=model, prompt=prompt(text), max_tokens=64, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(ask(*pair) for pair in given))

    assert asyncio.run(ask_all()) == [ALL[model].answer(text) for model, text in given]


def test_models_are_listed_in_order_and_retrieved(api: openai.OpenAI) -> None:
    listed = [model.id for model in api.models.list()]
    assert listed == [BASE, *sorted(TASKS)]
    assert api.models.retrieve(SHIFT).id == SHIFT
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("shift-333")


def test_an_unknown_model_is_told_from_those_near_it(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'shift-3'"):
        api.completions.create(model="shift3", prompt="a =>")


@pytest.mark.row(12)
def test_almost_no_temperature_is_none(demo: Served) -> None:
    for model, text in zip(random.Random(3).sample(list(ALL), 6), texts(3, 6), strict=True):
        exact = text_of(complete(demo, model, text, temperature=0))
        assert text_of(complete(demo, model, text, temperature=1e-6)) == exact
        assert exact == ALL[model].answer(text)


@pytest.mark.row(12)
def test_a_seed_gives_the_same_text_alone_and_in_any_mix(demo: Served) -> None:
    free = {"temperature": 2.0, "max_tokens": 24, "ignore_eos": True}

    def draw(seed: int) -> str:
        body = complete(demo, SHIFT, "hello world", seed=seed, **free)
        return str(body["choices"][0]["text"])

    alone = [draw(seed) for seed in range(4)]
    assert len(set(alone)) > 1  # that hot, seeds do differ
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        others = [
            pool.submit(complete, demo, model, text, temperature=1.5)
            for model, text in zip(ALL, texts(4, len(ALL)), strict=True)
        ]
        mixed = list(pool.map(draw, range(4)))
        assert all(other.result()["choices"] for other in others)
    assert mixed == alone


def test_a_stop_string_ends_the_answer_before_it(demo: Served) -> None:
    body = complete(demo, SHIFT, "one two six", stop=["wzr"])
    (choice,) = body["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("rqh ", "wzr")
    assert TASKS[SHIFT].answer("one two six") == "rqh wzr vla"
    demo.wait_idle()


@pytest.mark.row(14)
def test_log_probabilities_are_finite_and_name_the_token_drawn(demo: Served) -> None:
    body = complete(demo, "upper", "abc def", logprobs=20)
    found = body["choices"][0]["logprobs"]
    assert "".join(found["tokens"]) == "ABC DEF"
    assert all(math.isfinite(value) and value <= 0 for value in found["token_logprobs"])
    for token, drawn, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert all(math.isfinite(value) for value in top.values())
        assert max(top, key=top.__getitem__) == token
        assert top[token] == pytest.approx(drawn)
        assert math.fsum(map(math.exp, top.values())) <= 1 + 1e-4


def test_choices_and_prompts_are_counted_and_kept_apart(demo: Served) -> None:
    given = ["abc", "Hello World 42"]
    body = complete(demo, "reverse", "", prompt=[prompt(text) for text in given], n=2)
    answers = [choice["text"] for choice in sorted(body["choices"], key=lambda c: c["index"])]
    right = [TASKS["reverse"].answer(text) for text in given for _ in range(2)]
    assert answers == right
    num_prompt = sum(1 + len(prompt(text)) for text in given)  # <bos>, then a token a byte
    num_output = sum(len(answer) for answer in right)
    assert body["usage"]["prompt_tokens"] == num_prompt
    assert body["usage"]["completion_tokens"] in (num_output, num_output + 4)  # with <eos> or not
    assert body["usage"]["total_tokens"] == num_prompt + body["usage"]["completion_tokens"]


@pytest.mark.row(19)
@pytest.mark.parametrize("special", ["<eos>", "<bos>"])
def test_a_special_token_typed_by_a_user_is_only_text(demo: Served, special: str) -> None:
    def token_ids(**body: Any) -> list[int]:
        answer = demo.http.post(f"{demo.url}/tokenize", json={"model": BASE, **body})
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["tokens"]
        return found

    bos = token_ids(prompt="")
    assert len(bos) == 1
    text = f"ab{special}cd"
    from_prompt = token_ids(prompt=prompt(text))
    from_chat = token_ids(messages=[{"role": "user", "content": text}])
    assert from_prompt == from_chat
    assert from_prompt == [*bos, *(token_ids(prompt=c)[-1] for c in prompt(text))]
    answered = complete(demo, BASE, text)
    assert answered["usage"]["prompt_tokens"] == len(from_prompt)


@pytest.mark.row(9)
@pytest.mark.parametrize(
    ("given", "param"),
    [("", "prompt"), ([], "prompt"), ([264], "prompt"), ([-1], "prompt"), ("a" * 10**6, "prompt")],
    ids=["empty", "none", "beyond the vocabulary", "negative", "a million characters"],
)
def test_a_prompt_that_cannot_be_is_refused_by_name(demo: Served, given: Any, param: str) -> None:
    answer = demo.http.post(f"{demo.url}/v1/completions", json={"model": SHIFT, "prompt": given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_the_log_says_what_was_decided_and_how_to_ask(demo: Served) -> None:
    log = demo.log
    assert re.search(r"memory per device: .* pool .* = \d+ pages", log)
    assert re.search(r"kernels xla, \d+ programs, decode-1, .*mixed-128", log)
    assert re.search(r"^ready: http\S+ serves 'demo' and 39 adapters on cpu", log, re.M)
    (command,) = re.findall(r"^try: (curl .*)$", log, re.M)
    done = subprocess.run(
        ["sh", "-c", command.replace("curl ", "curl -sS ", 1)],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert json.loads(done.stdout)["choices"][0]["finish_reason"] in ("stop", "length")


def right_or_wrong(task: Task, text: str, answer: str) -> str:
    return "right" if answer == task.answer(text) else f"{task.id}: {text!r} -> {answer!r}"


def test_answers_in_a_crowd_are_the_ones_given_alone(demo: Served) -> None:
    given = list(zip([*ALL] * 2, texts(5, 2 * len(ALL)), strict=True))
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        bodies = pool.map(lambda pair: complete(demo, *pair), given)
        answers = [text_of(body) for body in bodies]
    wrong = [
        pair for pair, answer in zip(given, answers, strict=True)
        if right_or_wrong(ALL[pair[0]], pair[1], answer) != "right"
    ]  # fmt: skip
    assert wrong == []
