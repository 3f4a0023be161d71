"""A request's tokens depend on nothing but the request: not on its neighbours, chunks, preemptions.

Each mix runs under every setting of one warm runner. All answers are held against the oracle, and
where no two tokens nearly tie, they must be equal from setting to setting.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from sloraj.admission import choice_seed
from tests.e2e.engine_driver import ADAPTERS, EOS, ZERO_B, Engine, EngineDriver

Start = Callable[..., EngineDriver]
SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "in a mix": {},
    "in chunks": {"max_num_batched_tokens": 11},
    "preempted": {"num_pages": 36},
    "preempted, in chunks": {"num_pages": 34, "max_num_batched_tokens": 13},
}
CONTENTS = (None, *range(len(ADAPTERS)))


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: list[int]
    content: int | None
    params: dict[str, Any]


def ask_all(driver: EngineDriver, asked: list[Asked]) -> list[str]:
    """Load what is asked for, run all requests at once, and check each against the oracle."""
    contents = sorted({a.content for a in asked if a.content is not None})
    versions = {
        content: driver.loaded(f"a{content}", content, replace=True) for content in contents
    }
    requests = [
        driver.generate(a.prompt, None if a.content is None else f"a{a.content}", **a.params)
        for a in asked
    ]
    driver.run()
    for request, a in zip(requests, asked, strict=True):
        driver.check(request, a.content, None if a.content is None else versions[a.content])
    driver.check_freed()
    return requests


def answers_by_setting(start: Start, asked: list[Asked]) -> dict[str, list[Any]]:
    """The answers under each setting; preemption and chunking have happened where they should."""
    found = {}
    for setting, changes in SETTINGS.items():
        driver = start(**changes)
        requests = ask_all(driver, asked)
        assert (driver.core.stats()["preemptions"] > 0) == setting.startswith("preempted")
        found[setting] = [
            [
                (driver.tokens(r, i), driver.answers[r, i].finish_reason)
                for i in range(a.params.get("n", 1))
            ]
            for r, a in zip(requests, asked, strict=True)
        ]
    return found


def assert_equal_unless_tied(engine: Engine, found: dict[str, list[Any]]) -> None:
    """Equal under all settings. The oracle allows either of two tied tokens; few tie."""
    alone = found["alone"]
    num_different = sum(any(answers[i] != alone[i] for answers in found.values())
                        for i in range(len(alone)))  # fmt: skip
    assert num_different <= engine.oracle.num_near_ties
    assert engine.oracle.num_near_ties < engine.oracle.num_tokens / 100


def random_prompt(rng: random.Random, longest: int = 40) -> list[int]:
    return [rng.randrange(128) for _ in range(rng.randint(1, longest))]


@pytest.mark.row(45)
def test_greedy_tokens_are_those_of_merged_weights_in_any_mix(start: Start) -> None:
    engine = start().engine
    rng = random.Random(1)
    asked, expected = [], []
    while len(asked) < 24:
        prompt, content = random_prompt(rng), CONTENTS[len(asked) % len(CONTENTS)]
        adapter = None if content is None else engine.adapters[content]
        tokens = engine.oracle.greedy(prompt, 12, adapter)
        if tokens is not None:  # no two nearly tie
            asked.append(Asked(prompt, content, {"max_tokens": 12, "ignore_eos": True}))
            expected.append([(tokens, "length")])
    for setting, answers in answers_by_setting(start, asked).items():
        assert answers == expected, setting


def random_params(rng: random.Random) -> dict[str, Any]:
    params: dict[str, Any] = {
        "max_tokens": rng.randint(1, 14),
        "ignore_eos": rng.random() < 0.5,
        "temperature": rng.choice([0.0, 0.5, 1.0, 1.5]),
        "seed": rng.randrange(6),
        "n": rng.choice([1, 1, 1, 2]),
        "top_k": rng.choice([0, 0, 1, 5, 40]),
        "top_p": rng.choice([1.0, 1.0, 0.9, 0.5]),
        "min_p": rng.choice([0.0, 0.0, 0.1]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3, 0.8]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.7]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.5, -0.5]),
        "stop_token_ids": tuple(rng.sample(range(128), rng.choice([0, 0, 6]))),
        "logprobs": rng.choice([None, None, 0, 4]),
    }
    params["min_tokens"] = rng.choice([0, 0, params["max_tokens"] // 2])
    if rng.random() < 0.3:
        params["logit_bias"] = tuple((t, rng.choice([-100.0, 3.0])) for t in (5, EOS, 77))
    return params


def test_sampled_tokens_are_the_same_in_any_mix(start: Start) -> None:
    rng = random.Random(2)
    asked = [
        Asked(random_prompt(rng), CONTENTS[i % len(CONTENTS)], random_params(rng))
        for i in range(40)
    ]
    found = answers_by_setting(start, asked)
    assert_equal_unless_tied(start().engine, found)
    assert len({str(answer) for answer in found["alone"]}) > 30


PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 1.0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_count_the_same_tokens_after_preemption(temperature: float, start: Start) -> None:
    rng = random.Random(3)
    params = {"max_tokens": 24, "ignore_eos": True, "temperature": temperature, **PENALTIES}
    asked = [Asked(random_prompt(rng, 12), rng.choice([None, 0, 2]), params) for _ in range(10)]
    found = answers_by_setting(start, asked)
    assert_equal_unless_tied(start().engine, found)
    plain = [dataclasses.replace(a, params=params | {name: float(name[0] == "r") for name in
             PENALTIES}) for a in asked]  # fmt: skip
    driver = start()
    without = [driver.tokens(r) for r in ask_all(driver, plain)]
    with_penalties = [tokens for [(tokens, _)] in found["preempted"]]
    assert sum(a != b for a, b in zip(with_penalties, without, strict=True)) > len(asked) / 2


def test_choices_differ_and_each_is_the_single_choice_of_its_seed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = start(num_pages=60)
    version = driver.loaded("a", 1)
    prompt = random_prompt(random.Random(4))
    params = {"temperature": 1.0, "max_tokens": 16, "ignore_eos": True}
    many = driver.generate(prompt, "a", n=8, seed=5, **params)
    driver.run()
    driver.check(many, 1, version)
    choices = [driver.tokens(many, index) for index in range(8)]
    assert len(set(map(tuple, choices))) == 8
    first = driver.generate(prompt, "a", seed=5, **params)
    driver.run()
    assert driver.tokens(first) == choices[0]
    monkeypatch.setattr("sloraj.admission.choice_seed", lambda seed, *_: seed)
    for index in range(8):
        single = driver.generate(prompt, "a", seed=choice_seed(5, "", index), **params)
        driver.run()
        assert driver.tokens(single) == choices[index]


@pytest.mark.row(12)
def test_a_temperature_of_nearly_zero_is_greedy(start: Start) -> None:
    rng = random.Random(5)
    asked = [Asked(random_prompt(rng), rng.choice(CONTENTS), {"max_tokens": 10}) for _ in range(12)]
    nearly = [dataclasses.replace(a, params=a.params | {"temperature": 1e-6, "seed": i})
              for i, a in enumerate(asked)]  # fmt: skip
    driver = start()
    requests = ask_all(driver, asked + nearly)
    tokens = [driver.tokens(request) for request in requests]
    assert tokens[:12] == tokens[12:]


@pytest.mark.row(12)
def test_one_seed_gives_one_text_alone_and_in_a_mixed_batch(start: Start) -> None:
    rng = random.Random(6)
    twin = Asked(random_prompt(rng), 3, {"temperature": 1.0, "seed": 11, "max_tokens": 16})
    others = [Asked(random_prompt(rng), rng.choice(CONTENTS), {"temperature": 1.0, "seed": 12})
              for _ in range(7)]  # fmt: skip
    other_seed = dataclasses.replace(twin, params=twin.params | {"seed": 12})
    driver = start()
    [alone] = ask_all(driver, [twin])
    first, second, different, *_ = ask_all(driver, [twin, twin, other_seed, *others])
    assert driver.tokens(alone) == driver.tokens(first) == driver.tokens(second)
    assert driver.tokens(different) != driver.tokens(alone)


def test_a_token_that_may_not_come_never_comes_and_one_that_must_always_does(start: Start) -> None:
    driver = start()
    prompt = random_prompt(random.Random(7))
    params: dict[str, Any] = {"max_tokens": 10, "ignore_eos": True}
    plain = driver.generate(prompt, **params)
    forced = driver.generate(prompt, logit_bias=((33, 100.0),), **params)
    driver.run()
    assert driver.tokens(forced) == [33] * 10
    banned = tuple((token, -100.0) for token in driver.tokens(plain))
    without = driver.generate(prompt, logit_bias=banned, **params)
    driver.run()
    assert not set(driver.tokens(without)) & set(driver.tokens(plain))
    for request in (plain, forced, without):
        driver.check(request, None, None)


def test_an_answer_ends_at_its_stop_token_and_not_before_min_tokens(start: Start) -> None:
    driver = start()
    prompt = random_prompt(random.Random(8))
    plain = driver.generate(prompt, max_tokens=10, ignore_eos=True)
    driver.run()
    tokens = driver.tokens(plain)
    stop = tokens[5]
    place = tokens.index(stop)
    stopped = driver.generate(prompt, max_tokens=10, ignore_eos=True, stop_token_ids=(stop,))
    late = driver.generate(
        prompt, max_tokens=10, ignore_eos=True, stop_token_ids=(stop,), min_tokens=8
    )
    driver.run()
    answer = driver.answers[stopped, 0]
    assert (answer.token_ids, answer.stop_token_id) == (tokens[:place], stop)
    assert stop not in driver.tokens(late)[:8]
    driver.check(late, None, None)


def test_the_end_of_text_ends_an_answer_unless_it_is_ignored(start: Start) -> None:
    driver = start()
    prompt = random_prompt(random.Random(9))
    params: dict[str, Any] = {"max_tokens": 6, "logit_bias": ((EOS, 100.0),)}
    ended = driver.generate(prompt, **params)
    ignored = driver.generate(prompt, ignore_eos=True, **params)
    held = driver.generate(prompt, min_tokens=3, **params)
    driver.run()
    assert driver.answers[ended, 0].token_ids == []
    assert driver.answers[ended, 0].stop_token_id == EOS
    assert driver.tokens(ignored) == [EOS] * 6
    assert len(driver.tokens(held)) == 3 and EOS not in driver.tokens(held)
    for request in (ended, ignored, held):
        driver.check(request, None, None)


def test_reported_logprobs_are_those_of_the_model(start: Start) -> None:
    """Before penalties, bias and temperature; `check` compares them with the oracle's."""
    rng = random.Random(10)
    asked = [
        Asked(
            random_prompt(rng), content,
            {"logprobs": 20, "temperature": 1.3, "repetition_penalty": 2.0, "seed": 3},
        )
        for content in CONTENTS
    ]  # fmt: skip
    driver = start()
    for request in ask_all(driver, asked):
        assert len(driver.answers[request, 0].logprobs) == len(driver.tokens(request)) > 0


@pytest.mark.row(33)
def test_an_adapter_whose_b_is_zero_is_the_base_model_to_the_last_bit(start: Start) -> None:
    """In one place of one batch, among other adapters: first as the base, then as the adapter."""
    rng = random.Random(11)
    others = [Asked(random_prompt(rng), content, {"max_tokens": 9}) for content in CONTENTS[:6]]
    prompt = random_prompt(rng)
    params = {"max_tokens": 9, "logprobs": 20, "ignore_eos": True}
    found = []
    for content in (None, ZERO_B):
        driver = start()
        request = ask_all(driver, [*others[:3], Asked(prompt, content, params), *others[3:]])[3]
        answer = driver.answers[request, 0]
        found.append((answer.token_ids, answer.logprobs))
    assert found[0] == found[1]
