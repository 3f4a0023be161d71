"""The text level: increments add up, stop strings end requests, death fails all that is open."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from sloraj.config import EngineConfig
from sloraj.errors import (
    AdapterNotFound,
    ContextTooLong,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    SlorajError,
)
from sloraj.frontend import Frontend
from sloraj.frontend_api import RequestOutput
from sloraj.launch import start_frontend
from sloraj.messages import (
    Abort,
    FromEngine,
    Generate,
    ListAdapters,
    Reply,
    ToEngine,
    TokenOutput,
)
from sloraj.request import SamplingParams
from sloraj.tokenizer import Tokenizer
from sloraj.transport import OnMessages
from tests.sloraj import fake_core
from tests.sloraj.fake_core import EOS, MAX_MODEL_LEN, VERSION, VOCAB_SIZE, FakeCore, write_model

WAIT_S = 20.0


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> list[FakeCore]:
    """The fake cores built in this process."""
    built: list[FakeCore] = []
    original = fake_core.build

    def build(*args: Any) -> Any:
        core, info = original(*args)
        built.append(core)
        return core, info

    monkeypatch.setattr(fake_core, "build", build)
    return built


@pytest.fixture
def frontend(tmp_path: Path, cores: list[FakeCore]) -> Iterator[Frontend]:
    config = EngineConfig(model=write_model(tmp_path))
    made = start_frontend(config, process=False, core_factory=fake_core.FACTORY)
    yield made
    made.stop()


class Collector:
    """An `on_output` that can be waited for."""

    def __init__(self) -> None:
        self.outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    def __call__(self, output: RequestOutput) -> None:
        self.outputs.put(output)

    def until_end(self, n: int = 1) -> list[RequestOutput]:
        got: list[RequestOutput] = []
        while n:
            got.append(self.outputs.get(timeout=WAIT_S))
            if got[-1].error is not None:
                break
            n -= got[-1].finish_reason is not None
        return got

    def error(self) -> SlorajError:
        error = self.until_end()[-1].error
        assert error is not None
        return error


def run(frontend: Frontend, prompt: str | list[int], **params: Any) -> list[RequestOutput]:
    collector = Collector()
    frontend.submit("r", prompt, SamplingParams(**params), None, collector)
    return collector.until_end(params.get("n", 1))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_increments_add_up_to_the_answer(frontend: Frontend) -> None:
    collector = Collector()
    num_prompt = frontend.submit("r", "héllo", SamplingParams(max_tokens=9), "shift-0", collector)
    outputs = collector.until_end()
    assert num_prompt == 6
    assert "".join(o.text for o in outputs) == "héllohé"
    assert [t for o in outputs for t in o.token_ids] == list("héllohé".encode())
    assert [o.finish_reason for o in outputs[:-1]] == [None] * 8
    last = outputs[-1]
    assert (last.finish_reason, last.num_output_tokens, last.num_prompt_tokens) == ("length", 9, 6)
    assert last.adapter_version == VERSION


def test_an_unfinished_code_point_is_replaced_at_the_end(frontend: Frontend) -> None:
    outputs = run(frontend, "aé", max_tokens=2)
    assert "".join(o.text for o in outputs) == "a\ufffd"


def test_end_of_sequence_reports_the_token_and_shows_no_text(frontend: Frontend) -> None:
    last = run(frontend, [65, 66, EOS])[-1]
    assert (last.finish_reason, last.stop_reason, last.text) == ("stop", EOS, "")


def test_a_stop_string_ends_the_request_here_and_in_the_engine(
    frontend: Frontend, cores: list[FakeCore]
) -> None:
    outputs = run(frontend, "abcdef", max_tokens=100, stop=("de", "zz"))
    assert "".join(o.text for o in outputs) == "abc"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "de")
    assert outputs[-1].num_output_tokens == 5
    wait_for(lambda: Abort(request_id="r") in cores[0].received)


def test_a_stop_string_may_be_kept_in_the_output(frontend: Frontend) -> None:
    outputs = run(frontend, "abcdef", max_tokens=100, stop=("de",), include_stop_str_in_output=True)
    assert "".join(o.text for o in outputs) == "abcde"


def test_a_stop_string_before_min_tokens_is_passed_over(frontend: Frontend) -> None:
    outputs = run(frontend, "abcdef", max_tokens=100, min_tokens=6, stop=("de",))
    assert "".join(o.text for o in outputs) == "abcdefabc"


def test_text_held_for_a_stop_string_comes_out_at_the_end(frontend: Frontend) -> None:
    outputs = run(frontend, "abcdef", max_tokens=4, stop=("dex",))
    assert "".join(o.text for o in outputs) == "abcd"
    assert outputs[-1].finish_reason == "length"


def test_every_choice_ends_by_itself(frontend: Frontend) -> None:
    outputs = run(frontend, "abc", n=3, max_tokens=5)
    for index in range(3):
        own = [o for o in outputs if o.index == index]
        assert "".join(o.text for o in own) == "abcab"
        assert own[-1].finish_reason == "length"


def test_logprobs_carry_text_and_finite_numbers(frontend: Frontend) -> None:
    (output,) = run(frontend, "a", max_tokens=1, logprobs=2)
    assert output.logprobs is not None
    (position,) = output.logprobs
    assert (position.chosen.token, position.chosen.logprob) == ("a", -0.5)
    assert [entry.logprob for entry in position.top] == [-0.5, -9999.0]
    assert run(frontend, "a", max_tokens=1)[0].logprobs is None


def test_seed_and_max_tokens_are_resolved_before_the_engine(
    frontend: Frontend, cores: list[FakeCore]
) -> None:
    for given in (None, 10**6):
        collector = Collector()
        frontend.submit("r", "abc", SamplingParams(max_tokens=given), None, collector)
        assert collector.until_end()[-1].num_output_tokens == MAX_MODEL_LEN - 3
    run(frontend, "abc", seed=5)
    *unseeded, seeded = [m for m in cores[0].received if isinstance(m, Generate)]
    assert seeded.params["seed"] == 5
    assert len({m.params["seed"] for m in unseeded}) == 2
    assert all(0 <= m.params["seed"] < 2**32 for m in unseeded)


@pytest.mark.row(9)
@pytest.mark.parametrize(
    "prompt", ["", [], [-1], [VOCAB_SIZE], [1, "a"], [True], [1.5], "a\ud800"], ids=repr
)
def test_bad_prompts_are_refused_at_once_by_name(frontend: Frontend, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt: got") as caught:
        frontend.submit("r", prompt, SamplingParams(), None, Collector())
    assert caught.value.param == "prompt"


@pytest.mark.row(9)
def test_a_text_that_must_be_too_long_is_never_tokenized(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with pytest.raises(ContextTooLong, match="1000000 characters") as caught:
        frontend.submit("r", "x" * 10**6, SamplingParams(), None, Collector())
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("prompt", ["x" * MAX_MODEL_LEN, [65] * MAX_MODEL_LEN], ids=["text", "ids"])
def test_a_prompt_leaves_room_for_one_token(frontend: Frontend, prompt: str | list[int]) -> None:
    with pytest.raises(ContextTooLong, match=f"got {MAX_MODEL_LEN} tokens"):
        frontend.submit("r", prompt, SamplingParams(), None, Collector())
    assert run(frontend, prompt[1:])[-1].num_output_tokens == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", ((VOCAB_SIZE, 1.0),)),
        ("stop_token_ids", (VOCAB_SIZE,)),
        ("min_tokens", MAX_MODEL_LEN),
    ],
)
def test_parameters_the_model_cannot_serve_are_refused(
    frontend: Frontend, field: str, value: Any
) -> None:
    params = SamplingParams(**{"max_tokens": 10**4, field: value})
    with pytest.raises(InvalidRequest, match=rf"{field}: got \d+, allowed") as caught:
        frontend.submit("r", "abc", params, None, Collector())
    assert caught.value.param == field


def test_what_the_engine_refuses_arrives_as_an_output(frontend: Frontend) -> None:
    collector = Collector()
    frontend.submit("r", "abc", SamplingParams(), "missing", collector)
    error = collector.error()
    assert isinstance(error, AdapterNotFound)
    assert error.param == "model"


def test_a_running_request_id_is_not_taken_twice(frontend: Frontend) -> None:
    collector = Collector()
    frontend.submit("r", "abc", SamplingParams(max_tokens=400), None, collector)
    with pytest.raises(InvalidRequest, match="request_id"):
        frontend.submit("r", "abc", SamplingParams(), None, Collector())
    collector.until_end()
    assert run(frontend, "abc")[-1].finish_reason == "length"


def test_nothing_arrives_after_abort(frontend: Frontend, cores: list[FakeCore]) -> None:
    for _ in range(20):
        collector = Collector()
        frontend.submit("r", "abc", SamplingParams(max_tokens=400), None, collector)
        collector.outputs.get(timeout=WAIT_S)
        frontend.abort("r")
        num_seen = collector.outputs.qsize()
        time.sleep(0.005)
        assert collector.outputs.qsize() == num_seen
    frontend.abort("never there")
    wait_for(lambda: not frontend.stats().result(WAIT_S)["num_running"])


def test_a_caller_that_raises_costs_only_its_own_request(
    frontend: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: RequestOutput) -> None:
        raise RuntimeError("no thanks")

    frontend.submit("bad", "abc", SamplingParams(max_tokens=400), None, refuse)
    assert run(frontend, "abc")[-1].finish_reason == "length"
    wait_for(lambda: not frontend.stats().result(WAIT_S)["num_running"])
    assert "no thanks" in caplog.text


def test_a_message_that_makes_no_sense_fails_its_request(frontend: Frontend) -> None:
    collector = Collector()
    frontend.submit("r", "abc", SamplingParams(), "bad index", collector)
    assert isinstance(collector.error(), InternalError)


def test_calls_return_typed_values_and_typed_errors(frontend: Frontend) -> None:
    loaded = frontend.load_adapter("a", "/some/where", pinned=True).result(WAIT_S)
    assert (loaded.adapter_id, loaded.path, loaded.pinned) == ("a", "/some/where", True)
    assert frontend.list_adapters().result(WAIT_S) == [loaded]
    frontend.unload_adapter("a").result(WAIT_S)
    assert frontend.list_adapters().result(WAIT_S) == []
    with pytest.raises(AdapterNotFound, match="/nowhere"):
        frontend.load_adapter("b", "/nowhere").result(WAIT_S)


def test_drain_refuses_new_requests_and_waits_for_running_ones(frontend: Frontend) -> None:
    collector = Collector()
    frontend.submit("r", "abc", SamplingParams(max_tokens=100), None, collector)
    drained = frontend.drain()
    with pytest.raises(EngineUnavailable, match="draining"):
        frontend.submit("s", "abc", SamplingParams(), None, Collector())
    assert frontend.health().state == "draining"
    drained.result(WAIT_S)
    assert collector.until_end()[-1].finish_reason == "length"


def test_health_is_ready_and_hears_a_heartbeat(frontend: Frontend) -> None:
    wait_for(lambda: frontend.health().heartbeat_age_s > 0.05)
    wait_for(lambda: frontend.health().heartbeat_age_s < 0.05)  # another has come since
    assert frontend.health().state == "ready"


def test_a_dead_engine_fails_what_is_open_and_refuses_what_is_new(frontend: Frontend) -> None:
    running, fatal = Collector(), Collector()
    frontend.submit("r", "abc", SamplingParams(max_tokens=500), None, running)
    frontend.submit("x", "abc", SamplingParams(), "raise", fatal)
    pending = [frontend.unload_adapter("a"), frontend.drain()]
    for error in (running.error(), fatal.error()):
        assert isinstance(error, EngineUnavailable)
        assert "RuntimeError: the device is on fire" in error.message
    for call in [*pending, frontend.stats()]:
        assert isinstance(call.exception(WAIT_S), EngineUnavailable)
    assert frontend.health().state == "dead"
    assert "on fire" in frontend.health().detail
    with pytest.raises(EngineUnavailable, match="on fire"):
        frontend.submit("s", "abc", SamplingParams(), None, Collector())


def test_an_engine_that_talks_nonsense_is_dead_and_nobody_waits(
    frontend: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    collector = Collector()
    frontend.submit("r", "abc", SamplingParams(), "nonsense", collector)
    assert "receiver failed: TypeError" in collector.error().message
    assert frontend.health().state == "dead"
    assert "the receiver fails" in caplog.text


def test_stop_fails_what_runs_and_ends_every_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    config = EngineConfig(model=write_model(tmp_path))
    frontend = start_frontend(config, process=False, core_factory=fake_core.FACTORY)
    collector = Collector()
    frontend.submit("r", "abc", SamplingParams(max_tokens=500), None, collector)
    frontend.stop()
    frontend.stop()
    assert isinstance(collector.error(), EngineUnavailable)
    assert frontend.health().state == "dead"
    assert set(threading.enumerate()) <= before


class SilentTransport:
    """A transport that takes everything and answers nothing, until it is told to."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.deliver: OnMessages = lambda _: None

    def start(self, on_progress: Any) -> dict[str, Any]:
        return {}

    def listen(self, on_messages: OnMessages) -> None:
        self.deliver = on_messages

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def stop(self) -> None:
        self.sent.append(Abort(request_id="stopped"))


def silent_frontend(info_of: Frontend) -> tuple[Frontend, SilentTransport]:
    transport = SilentTransport()
    return Frontend(transport, info_of.tokenizer, info_of.info), transport


def tokens(index: int, ids: list[int], finish: str | None = None) -> FromEngine:
    return TokenOutput(request_id="r", index=index, token_ids=ids, finish_reason=finish)


def test_several_tokens_in_one_message_are_cut_at_the_stop_string(frontend: Frontend) -> None:
    quiet, transport = silent_frontend(frontend)
    collector = Collector()
    quiet.submit("r", "abc", SamplingParams(stop=("b",)), None, collector)
    transport.deliver([tokens(0, [65, 98, 67], finish="length")])
    (output,) = collector.until_end()
    assert (output.text, output.token_ids, output.num_output_tokens) == ("A", (65, 98), 2)
    assert (output.finish_reason, output.stop_reason) == ("stop", "b")
    assert Abort(request_id="r") not in transport.sent


def test_a_choice_that_stopped_leaves_the_others_running(frontend: Frontend) -> None:
    quiet, transport = silent_frontend(frontend)
    collector = Collector()
    quiet.submit("r", "abc", SamplingParams(stop=("b",), n=2), None, collector)
    transport.deliver([tokens(0, [98]), tokens(0, [65]), tokens(1, [65])])
    assert Abort(request_id="r") not in transport.sent
    transport.deliver([tokens(1, [98])])
    outputs = collector.until_end(2)
    assert [(o.index, o.text, o.finish_reason) for o in outputs] == [
        (0, "", "stop"), (1, "A", None), (1, "", "stop"),
    ]  # fmt: skip
    assert transport.sent[-1] == Abort(request_id="r")


def test_a_reply_that_cannot_be_read_fails_its_call(frontend: Frontend) -> None:
    quiet, transport = silent_frontend(frontend)
    future: Future[Any] = quiet.list_adapters()
    (message,) = transport.sent
    assert isinstance(message, ListAdapters)
    transport.deliver([Reply(call_id=message.call_id, value="nonsense")])
    assert isinstance(future.exception(WAIT_S), InternalError)
