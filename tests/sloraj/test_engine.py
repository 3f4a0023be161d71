"""The Python interface: order kept, one adapter a prompt, errors typed, nothing left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sloraj
from sloraj import Engine, EngineConfig, SamplingParams
from sloraj.errors import (
    AdapterNotFound,
    ContextTooLong,
    EngineUnavailable,
    InvalidRequest,
    QueueFull,
)
from sloraj.launch import ProgressBars
from sloraj.messages import Generate
from tests.sloraj.fake_core import (
    FACTORY,
    MAX_MODEL_LEN,
    VERSION,
    FakeCore,
    answer_token,
    write_model,
)

TEN = SamplingParams(max_tokens=10)


@pytest.fixture(params=[False, True], ids=["thread", "process"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(
        write_model(tmp_path), core_factory=FACTORY, process=request.param, max_num_waiting=8
    ) as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path)


def expected(prompt: str, adapter: str | None, num: int = 10) -> str:
    ids = [answer_token(list(prompt.encode()), adapter, place) for place in range(num)]
    return bytes(ids).decode()


def test_more_prompts_than_one_tenant_may_queue_are_answered(model: str) -> None:
    with Engine(model, core_factory=FACTORY, queue_order="vtc", tenant_max_waiting=3) as engine:
        answers = engine.generate([f"prompt {n}" for n in range(20)], TEN)
    assert [a.text for a in answers] == [expected(f"prompt {n}", None) for n in range(20)]


def test_prompts_with_adapters_are_answered_in_order(engine: Engine) -> None:
    prompts = [f"prompt {n}" for n in range(60)]
    adapters = [None if n % 3 == 0 else f"shift-{n % 3}" for n in range(60)]
    answers = engine.generate(prompts, TEN, adapters)
    assert [a.text for a in answers] == [
        expected(p, a) for p, a in zip(prompts, adapters, strict=True)
    ]
    assert [a.adapter_id for a in answers] == adapters
    assert [a.adapter_version for a in answers[:2]] == [None, VERSION]
    assert answers[0].finish_reason == "length"
    assert answers[0].num_prompt_tokens == len("prompt 0")
    assert 1 < engine.stats()["peak"] <= 8, "many at once, never more than the engine's queue holds"


def test_one_of_anything_serves_all(engine: Engine) -> None:
    assert [a.text for a in engine.generate("abc", TEN)] == [expected("abc", None)]
    assert [a.text for a in engine.generate([97, 98, 99], TEN)] == [expected("abc", None)]
    by_adapter = engine.generate("abc", TEN, ["shift-1", "shift-2"])
    assert [a.text for a in by_adapter] == [expected("abc", f"shift-{n}") for n in (1, 2)]
    params = [SamplingParams(max_tokens=n) for n in (1, 2)]
    assert [a.text for a in engine.generate([[97, 98], "cd"], params)] == ["a", "cd"]
    assert engine.generate([]) == []
    assert engine.generate([], adapter=[]) == []


def test_lists_of_different_length_are_refused_by_name(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=r"adapter: got 2, allowed: 1 or .* 3"):
        engine.generate(["a", "b", "c"], TEN, ["shift-1", "shift-2"])


def test_choices_and_logprobs_are_kept_apart(engine: Engine) -> None:
    (answer,) = engine.generate("ab", SamplingParams(max_tokens=3, n=2, logprobs=1))
    assert answer.texts == ("aba", "aba")
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.logprobs is not None
    assert [position.chosen.token for position in answer.logprobs] == ["a", "b", "a"]


def test_the_first_error_is_raised_and_the_rest_dropped(engine: Engine) -> None:
    long = SamplingParams(max_tokens=400)
    with pytest.raises(AdapterNotFound):
        engine.generate(["abc"] * 3, long, [None, "missing", None])
    with pytest.raises(ContextTooLong):
        engine.generate(["abc", "x" * MAX_MODEL_LEN], long)
    while engine.stats()["num_running"]:
        pass
    assert engine.generate("abc", TEN)[0].text == expected("abc", None)


def test_errors_may_be_returned_each_in_its_place(engine: Engine) -> None:
    answers = engine.generate(
        ["abc", "abc", "x" * MAX_MODEL_LEN], TEN, [None, "missing", None], return_errors=True
    )
    assert [type(a.error) for a in answers] == [type(None), AdapterNotFound, ContextTooLong]
    assert answers[0].text == expected("abc", None)
    assert answers[1].text == ""
    assert answers[1].finish_reason is None


def test_each_request_has_its_priority_and_its_tenant(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Generate] = []
    start = FakeCore._start
    monkeypatch.setattr(FakeCore, "_start", lambda core, m: [sent.append(m), start(core, m)][1])
    with Engine(model, core_factory=FACTORY) as engine:
        engine.generate(["a", "b"], TEN, [None, "shift-1"], priority=[2, -1])
        engine.generate(["c", "d"], TEN, priority=3, tenant=["team", None])
        list(engine.stream("e", TEN, "shift-1", priority=4, tenant="me"))
        with pytest.raises(InvalidRequest, match="adapter: got 2"):
            engine.generate("a", TEN, priority=[1, 2, 3], adapter=[None, None])
        base = engine.info.model_id
    assert {(tuple(m.prompt_token_ids), m.priority, m.tenant) for m in sent} == {
        (tuple(b"a"), 2, base),
        (tuple(b"b"), -1, "shift-1"),
        (tuple(b"c"), 3, "team"),
        (tuple(b"d"), 3, base),
        (tuple(b"e"), 4, "me"),
    }


def test_a_stream_is_the_answer_in_pieces(engine: Engine) -> None:
    pieces = list(engine.stream("abc", TEN, "shift-1"))
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == expected("abc", "shift-1")
    assert pieces[-1].finish_reason == "length"


def test_closing_a_stream_drops_its_request(engine: Engine) -> None:
    for _ in range(20):  # more than the engine takes at once
        with engine.stream("abc", SamplingParams(max_tokens=500)) as stream:
            next(stream)
        assert list(stream) == []
    while engine.stats()["num_running"]:
        pass


def test_a_stream_dropped_without_closing_drops_its_request(engine: Engine) -> None:
    for piece in itertools.islice(engine.stream("abc", SamplingParams(max_tokens=500)), 1):
        assert piece.text == "a"
    while engine.stats()["num_running"]:
        pass


def test_a_stream_raises_what_went_wrong(engine: Engine) -> None:
    with pytest.raises(AdapterNotFound):
        list(engine.stream("abc", TEN, "missing"))


def test_adapters_come_and_go(engine: Engine, tmp_path: Path) -> None:
    loaded = engine.load_adapter("a", tmp_path)
    assert loaded.path == str(tmp_path)
    assert engine.list_adapters() == [loaded]
    engine.unload_adapter("a")
    assert engine.list_adapters() == []


def test_many_threads_share_an_engine(engine: Engine) -> None:
    results: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        answers = engine.generate([f"thread {number}"] * 10, TEN, f"shift-{number}")
        results[number] = [a.text for a in answers]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [expected(f"thread {n}", f"shift-{n}")] * 10 for n in range(4)}


@pytest.mark.parametrize("fault", ["raise", "exit"])
def test_a_dying_engine_raises_and_says_why(model: str, fault: str) -> None:
    with Engine(model, core_factory=FACTORY, process=True) as engine:
        with pytest.raises(EngineUnavailable, match=r"on fire|exit code 9"):
            engine.generate(["abc"] * 3, TEN, [None, fault, None])
        assert engine.health().state == "dead"
        with pytest.raises(EngineUnavailable):
            engine.generate("abc")
        with pytest.raises(EngineUnavailable):
            engine.stats()


def test_a_full_queue_is_reported(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._runner.window, "_capacity", 1000)
    answers = engine.generate(["abc"] * 40, SamplingParams(max_tokens=300), return_errors=True)
    assert {type(a.error) for a in answers} == {type(None), QueueFull}


def test_settings_reach_the_configuration(model: str) -> None:
    with pytest.raises(sloraj.SlorajError, match="max_num_seqs: got 0"):
        Engine(model, core_factory=FACTORY, max_num_seqs=0)
    with pytest.raises(TypeError, match="max_seqs"):
        Engine(model, core_factory=FACTORY, max_seqs=1)


def test_adapters_may_be_given_as_a_mapping_or_as_pairs(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EngineConfig] = []

    def record(config: EngineConfig, **_: Any) -> None:
        seen.append(config)

    monkeypatch.setattr("sloraj.engine.start_frontend", record)
    Engine(model, adapters={"a": Path("/x")})
    Engine(model, adapters=[("a", "/x")])
    assert [c.adapters for c in seen] == [(("a", "/x"),)] * 2


def test_progress_bars_show_the_stages(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Engine(model, core_factory=FACTORY, progress=True).close()
    shown = capsys.readouterr().err
    assert "weights" in shown
    assert "2/2" in shown
    Engine(model, core_factory=FACTORY).close()
    assert capsys.readouterr().err == ""


def test_a_stage_that_is_done_shows_so_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    bars = ProgressBars()
    bars("compile", 0, 5)
    bars("compile", 5, 5)
    shown = capsys.readouterr().err
    assert "compile: 100%" in shown and shown.endswith("\n")
    bars.close()


def test_a_bar_begins_anew_with_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    bars = ProgressBars()
    for step in [("weights", 2, 2), ("compile", 0, 5), ("compile", 5, 5)]:
        bars(*step)
    bars.close()
    shown = capsys.readouterr().err
    assert "weights: 100%" in shown
    assert "compile: 100%" in shown
    assert "5/5" in shown
