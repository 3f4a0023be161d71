"""Laws of the engine core: what a caller sees of requests, adapters and the end."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from typing import Any, NoReturn

import pytest

from sloraj.core import EngineCore
from sloraj.errors import (
    AdapterLoadError,
    ContextTooLong,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    QueueFull,
    SlorajError,
    from_wire,
)
from sloraj.messages import (
    Dead,
    Drain,
    FromEngine,
    Generate,
    GetStats,
    Heartbeat,
    ListAdapters,
    LoadAdapter,
    Reply,
    RequestFailed,
    Shutdown,
    TokenOutput,
)
from sloraj.policies.settings import QueueConfig
from tests.sloraj.core_driver import EOS, CoreDriver, load_from_path
from tests.sloraj.fake_runner import tokens_alone


def test_tokens_are_the_same_alone_and_in_any_mix() -> None:
    driver = CoreDriver()
    driver.loaded("one", "1:3")
    driver.loaded("two", "2:5")
    prompts = [[1, 2, 3], list(range(20)), [4], [5, 6], [9] * 11, [8, 8]]
    adapters = [None, "one", "two", "one", None, "two"]
    contents = {None: 0, "one": 1, "two": 2}
    ids = [driver.generate(p, a, max_tokens=12) for p, a in zip(prompts, adapters, strict=True)]
    driver.run()
    for request_id, prompt, adapter in zip(ids, prompts, adapters, strict=True):
        driver.expect(request_id, prompt, contents[adapter], max_tokens=12)
    driver.expect_clean()


def test_adapters_are_listed_by_name_whatever_order_they_came_in() -> None:
    driver = CoreDriver()
    for name in ("two", "one", "three"):
        driver.loaded(name, "1:3")
    listed = driver.ask(ListAdapters)
    assert [info["adapter_id"] for info in listed] == ["one", "three", "two"]


def test_a_stop_id_ends_a_choice_and_is_not_among_its_tokens() -> None:
    driver = CoreDriver(vocab_size=12)
    prompts = [[i, i + 1] for i in range(8)]
    ids = [driver.generate(p, ignore_eos=False, max_tokens=50) for p in prompts]
    driver.run()
    for request_id, prompt in zip(ids, prompts, strict=True):
        driver.expect(request_id, prompt, max_tokens=50, stop_ids=(EOS,))
        answer = driver.answers[request_id, 0]
        assert (answer.stop_token_id == EOS) == (answer.finish_reason == "stop")
    assert "stop" in {a.finish_reason for a in driver.answers.values()}
    assert driver.ask(GetStats)["finished_requests"] == 8
    driver.expect_clean()


def test_n_choices_of_one_request_are_seeded_apart_and_repeatable() -> None:
    driver = CoreDriver()
    params = {"n": 3, "seed": 11, "temperature": 1.0, "max_tokens": 6}
    request_id = driver.generate([1, 2], request_id="same", **params)
    driver.run()
    choices = [driver.answers[request_id, index].token_ids for index in range(3)]
    for index in range(3):
        driver.expect(request_id, [1, 2], index=index, max_tokens=6, seed=11)
    assert len({tuple(tokens) for tokens in choices}) == 3
    del driver.answers[request_id, 0], driver.answers[request_id, 1], driver.answers[request_id, 2]
    driver.generate([1, 2], request_id="same", **params)
    driver.run()
    assert choices == [driver.answers[request_id, index].token_ids for index in range(3)]
    assert driver.ask(GetStats)["finished_requests"] == 2


def test_logprobs_come_one_entry_a_token_and_only_where_asked_for() -> None:
    driver = CoreDriver()
    asked = driver.generate([1], logprobs=1, max_tokens=3)
    silent = driver.generate([1], max_tokens=3)
    driver.run()
    tokens = driver.answers[asked, 0].token_ids
    assert driver.answers[asked, 0].logprobs == [[t, -1.0, [[t, -1.0]]] for t in tokens]
    assert driver.answers[silent, 0].logprobs == []


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([], {}, InvalidRequest, "prompt"),
        ([50], {}, InvalidRequest, "prompt"),
        ([-1], {}, InvalidRequest, "prompt"),
        ([1] * 64, {}, ContextTooLong, "prompt"),
        ([1], {"logit_bias": [[50, 1.0]]}, InvalidRequest, "logit_bias"),
        ([1], {"stop_token_ids": [50]}, InvalidRequest, "stop_token_ids"),
        ([1], {"temperature": 3.0}, InvalidRequest, "temperature"),
        ([1], {"temperature": "hot"}, InvalidRequest, "params"),
        ([1], {"warmth": 1}, InvalidRequest, "warmth"),
        ([1], {"max_tokens": 45}, InvalidRequest, "max_tokens"),  # 12 pages of 9
    ],
)
def test_a_bad_request_fails_alone_and_names_the_field(
    prompt: list[int], params: dict[str, Any], error: type[SlorajError], param: str
) -> None:
    driver = CoreDriver(num_pages=10)
    bad = driver.generate(prompt, **params)
    good = driver.generate([1, 2])
    driver.run()
    assert type(driver.failures[bad]) is error
    assert driver.failures[bad].param == param
    assert "allowed" in driver.failures[bad].message or param == "params"
    driver.expect(good, [1, 2])
    driver.expect_clean()


def test_max_tokens_ends_at_the_context_limit_and_null_means_what_fits() -> None:
    driver = CoreDriver(max_model_len=24)
    limited = driver.generate([1] * 10, max_tokens=1000)
    unlimited = driver.generate([2] * 10, max_tokens=None)
    driver.run()
    driver.expect(limited, [1] * 10, max_tokens=14)
    driver.expect(unlimited, [2] * 10, max_tokens=14)
    small = CoreDriver(num_pages=6, page_size=4)  # 5 pages, 3 of them the adapter's
    small.loaded("a", "1:3")
    request_id = small.generate([1] * 3, "a", max_tokens=None)
    small.run()
    small.expect(request_id, [1] * 3, 1, max_tokens=6)  # 8 places, and the last token needs none


def test_a_request_beside_its_adapter_may_be_too_much_for_the_pool() -> None:
    driver = CoreDriver(num_pages=10, page_size=4)
    driver.loaded("a", "1:7")
    base = driver.generate([1] * 8, max_tokens=5)
    adapted = driver.generate([1] * 8, "a", max_tokens=5)
    driver.run()
    driver.expect(base, [1] * 8, max_tokens=5)
    error = driver.failures[adapted]
    assert isinstance(error, InvalidRequest) and "7 pages of adapters" in error.message
    driver.expect_clean()


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    driver = CoreDriver(max_num_waiting=3, max_num_seqs=1)
    ids = [driver.generate([n], max_tokens=4) for n in range(5)]
    driver.step()
    errors = [driver.failures[request_id] for request_id in ids[3:]]
    assert all(isinstance(error, QueueFull) for error in errors)
    assert all(1 <= (error.retry_after_s or 0) <= 60 for error in errors)
    driver.run()
    for n, request_id in enumerate(ids[:3]):
        driver.expect(request_id, [n], max_tokens=4)


def test_logits_that_are_not_finite_fail_their_request_and_no_other() -> None:
    driver = CoreDriver()
    bad = driver.generate([1], n=3, temperature=1.0, seed=1, max_tokens=20)
    good = driver.generate([2], max_tokens=20)
    for _ in range(3):
        driver.step()
    driver.runner.is_finite = lambda sequence: (sequence.request_id, sequence.index) != (bad, 1)
    driver.run()
    error = driver.failures[bad]
    assert isinstance(error, InternalError) and "not finite" in error.message
    driver.expect(good, [2], max_tokens=20)
    driver.expect_clean()


def test_drain_refuses_new_requests_and_replies_after_the_last() -> None:
    driver = CoreDriver()
    running = driver.generate([1], max_tokens=8)
    driver.step()
    call_id = driver.call(Drain)
    late = driver.generate([2])
    driver.step()
    assert isinstance(driver.failures[late], EngineUnavailable)
    assert call_id not in driver.replies
    driver.run()
    assert driver.replies[call_id] is None
    driver.expect(running, [1], max_tokens=8)
    idle = CoreDriver()
    assert idle.ask(Drain) is None


def test_shutdown_fails_what_runs_and_waits_and_answers_open_calls() -> None:
    driver = CoreDriver(max_num_seqs=1)
    driver.loaded("a", "1:3")
    ids = [driver.generate([n], "a", max_tokens=30) for n in range(3)]
    driver.step()
    driver.executor.is_held = True
    unloading = driver.unload("a")
    calls = [driver.load("b", "2:3"), driver.call(Drain)]
    driver.step()
    driver.core.submit(Shutdown())
    late = driver.generate([9])
    calls.append(driver.call(ListAdapters))
    driver.step()
    assert driver.core.is_stopped and driver.death is None
    assert all(isinstance(driver.failures[i], EngineUnavailable) for i in (*ids, late))
    assert all(isinstance(driver.replies[call_id], EngineUnavailable) for call_id in calls)
    assert driver.replies[unloading] is None  # what held it has gone
    stats = driver.core.stats()
    assert stats["num_pages_free"] == stats["num_pages"]
    assert driver.core.step() == []


@pytest.mark.parametrize("verb", ["execute", "collect", "update"])
def test_a_fault_in_a_step_fails_everything_and_ends_the_core(verb: str) -> None:
    driver = CoreDriver()
    ids = [driver.generate([n], max_tokens=30) for n in range(6)]
    call_id = driver.call(Drain)
    driver.step()
    driver.step()

    def fail(*args: Any) -> NoReturn:
        raise RuntimeError("the device fell off")

    target = driver.core._scheduler if verb == "update" else driver.runner
    setattr(target, verb, fail)
    messages = driver.core.step()
    for message in messages:
        driver._hear(message)
    assert messages[-1] == Dead(reason="RuntimeError: the device fell off")
    assert all(isinstance(driver.failures[request_id], InternalError) for request_id in ids)
    assert isinstance(driver.replies[call_id], InternalError)
    assert driver.core.is_stopped and driver.core.step() == []


def test_an_owner_violation_on_the_device_ends_the_core(caplog: pytest.LogCaptureFixture) -> None:
    driver = CoreDriver()
    driver.generate([1])
    driver.step()
    driver.runner.handles[0] = dataclasses.replace(driver.runner.handles[0], owner_violations=1)
    driver.core._enqueued = driver.runner.handles[0]
    driver.step()
    assert driver.death == "InternalError: 1 rows would have read another's pages"
    dead = driver.messages[-1]
    assert isinstance(dead, Dead) and dead.error is not None
    assert isinstance(from_wire(dead.error), InternalError)
    assert [record.exc_info is not None for record in caplog.records] == [True]  # where it broke


def test_a_request_id_in_use_is_refused() -> None:
    driver = CoreDriver()
    driver.generate([1], request_id="x", max_tokens=30)
    driver.generate([2], request_id="x")
    messages = driver.core.step()
    (failure,) = [m for m in messages if isinstance(m, RequestFailed)]
    assert failure.error["param"] == "request_id"
    assert driver.core.stats()["num_requests"] == 1


def test_stats_count_what_happened() -> None:
    driver = CoreDriver()
    driver.loaded("a", "1:3")
    driver.generate([1] * 5, "a", max_tokens=4)
    driver.generate([2] * 6, max_tokens=4)
    driver.run()
    stats = driver.ask(GetStats)
    assert stats["sampled_tokens"] == 8
    assert stats["computed_tokens"] == 5 + 3 + 6 + 3
    assert stats["adapter_installs"] == stats["num_adapters_resident"] == 1
    assert stats["num_pages_adapters"] == 3
    assert stats["runner"] == {"violations": 0}


def test_preload_reports_each_adapter_and_raises_for_the_first_bad_one() -> None:
    driver = CoreDriver()
    core = EngineCore(driver.config, driver.runner, load_from_path)  # with threads of its own
    done: list[int] = []
    core.preload([("a", "1:3"), ("b", "2:3"), ("c", "1:3")], done.append)
    assert done == [1, 2, 3]
    assert core.stats()["num_adapters"] == 3
    with pytest.raises(AdapterLoadError, match="bad path"):
        core.preload([("d", "nonsense")], done.append)
    core.submit(Shutdown())
    core.step()


def test_the_loop_blocks_while_idle_beats_and_ends_on_shutdown() -> None:
    driver = CoreDriver()
    core = EngineCore(driver.config, driver.runner, load_from_path)
    heard: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()

    def emit(messages: list[FromEngine]) -> None:
        for message in messages:
            heard.put(message)

    thread = threading.Thread(target=core.run, args=(emit,))
    thread.start()
    assert isinstance(heard.get(timeout=10), Heartbeat)
    core.submit(LoadAdapter(call_id=1, adapter_id="a", path="1:3"))
    reply = heard.get(timeout=10)
    assert isinstance(reply, Reply) and reply.error is None
    request = Generate(
        request_id="r",
        prompt_token_ids=[1, 2],
        adapter_id="a",
        params={"temperature": 0.0, "max_tokens": 5, "ignore_eos": True},
    )
    core.submit(request)
    tokens: list[int] = []
    while True:
        message = heard.get(timeout=10)
        if isinstance(message, TokenOutput):
            tokens += message.token_ids
            if message.finish_reason is not None:
                break
    assert tokens == tokens_alone([1, 2], 1, 0, driver.config.vocab_size, 5, set())[0]
    used = time.thread_time()
    assert isinstance(heard.get(timeout=10), Heartbeat)  # idle, and still beating
    assert time.thread_time() - used < 0.5
    core.submit(Shutdown())
    thread.join(timeout=10)
    assert not thread.is_alive()
    core.check_integrity()


@pytest.mark.parametrize(
    ("standing", "order", "param"),
    [
        ({"priority": 1}, "fcfs", "priority"),
        ({"priority": 2**31}, "priority", "priority"),
        ({"priority": -(2**31)}, "vtc", "priority"),
        ({"tenant": ""}, "vtc", "tenant"),
        ({"tenant": "x" * 257}, "vtc", "tenant"),
    ],
)
def test_a_standing_that_cannot_be_heeded_is_refused_by_name(
    standing: dict[str, Any], order: str, param: str
) -> None:
    driver = CoreDriver(queue=QueueConfig(queue_order=order))
    request_id = driver.generate([1], **standing)
    driver.run()
    failure = driver.failures[request_id]
    assert isinstance(failure, InvalidRequest) and failure.param == param
    driver.expect_clean()


def test_without_a_tenant_the_adapter_is_the_tenant() -> None:
    driver = CoreDriver(queue=QueueConfig(queue_order="vtc"))
    driver.loaded("a", "1:2")
    for adapter_id, tenant in ((None, None), ("a", None), ("a", "team"), (None, "team")):
        driver.generate([1], adapter_id, tenant=tenant)
    driver.step()
    tenants = [s.tenant for r in driver.core._requests for s in r.sequences]
    assert tenants == ["", "a", "team", "team"]
    assert driver.core.stats()["queue"]["tenants"] == 3
