"""A trace through a core: arrivals, moments and counts are those that can be computed by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.clock import SimulatedClock
from bench.replay import Replay, ReplayError, ReplayResult
from bench.slo import throughput, wall_s
from bench.trace import Request, default_tenant
from sloraj.batch import ScheduledBatch, StepResult
from sloraj.core import EngineCore
from sloraj.messages import LoadAdapter
from tests.sloraj.conversation import HandExecutor
from tests.sloraj.core_driver import DEFAULT_CONFIG, load_from_path
from tests.sloraj.fake_runner import FakeRunner

STEP_S = 1.0


class TimedRunner(FakeRunner):
    """Every step takes a second after the one before it."""

    def __init__(self, clock: SimulatedClock, *args: Any) -> None:
        super().__init__(*args)
        self._clock, self._free_s = clock, 0.0

    def execute(self, batch: ScheduledBatch) -> Any:
        self._free_s = max(self._free_s, self._clock.now()) + STEP_S
        return self._free_s, super().execute(batch)

    def collect(self, handle: Any) -> StepResult:
        end_s, inner = handle
        self._clock.sleep_until(end_s)
        return super().collect(inner)


def _core(num_adapters: int = 0, **changes: Any) -> tuple[EngineCore, SimulatedClock, TimedRunner]:
    clock = SimulatedClock(1000.0)
    config = dataclasses.replace(DEFAULT_CONFIG, **changes)
    runner = TimedRunner(
        clock, config.num_pages, config.page_size, config.max_num_seqs, config.vocab_size,
        config.max_num_batched_tokens,
    )  # fmt: skip
    core = EngineCore(
        config, runner, load_from_path, clock=clock.now, loader_executor=HandExecutor()
    )
    for i in range(num_adapters):
        core.submit(LoadAdapter(call_id=i, adapter_id=f"adapter-{i}", path=f"{i + 1}:1"))
    core.step()
    core.step()
    return core, clock, runner


def _request(
    arrival_s: float, adapter: int | None = None, prompt: int = 4, output: int = 3
) -> Request:
    return Request(
        arrival_s=arrival_s, adapter=adapter, tenant=default_tenant(adapter),
        num_prompt_tokens=prompt, num_output_tokens=output,
    )  # fmt: skip


def _run(core: EngineCore, clock: SimulatedClock, trace: list[Request], **kw: Any) -> ReplayResult:
    vocab = core._config.vocab_size
    return Replay(core, trace, clock, vocab_size=vocab, keeps_moments=True, **kw).run()


def test_a_request_alone_gets_a_token_every_step_from_its_arrival_on() -> None:
    core, clock, _ = _core()
    (outcome,) = _run(core, clock, [_request(2.5, output=4)]).outcomes
    assert (outcome.sent_s, outcome.finish_reason) == (2.5, "length")
    assert outcome.token_s == [3.5, 4.5, 5.5, 6.5]
    assert outcome.ended_s == outcome.last_token_s == 6.5


def test_time_without_work_is_passed_over_and_counts_as_wall_time() -> None:
    core, clock, _ = _core()
    outcomes = _run(core, clock, [_request(0.0), _request(100.0)]).outcomes
    assert [o.first_token_s for o in outcomes] == [1.0, 101.0]
    assert wall_s(outcomes) == 103.0
    assert throughput(outcomes) == pytest.approx(2 / 103)


def test_no_request_is_seen_before_its_arrival_and_each_ends_once() -> None:
    core, clock, runner = _core(3)
    trace = [_request(0.7 * i, adapter=i % 3, output=1 + i % 4) for i in range(20)]
    outcomes = _run(core, clock, trace).outcomes
    assert not runner.violations
    for request, outcome in zip(trace, outcomes, strict=True):
        assert outcome.num_output_tokens == request.num_output_tokens
        assert outcome.error is None and outcome.sent_s is not None
        assert request.arrival_s <= outcome.sent_s < request.arrival_s + STEP_S
        assert outcome.first_token_s is not None and outcome.first_token_s > outcome.sent_s


def test_a_second_run_counts_its_own_installs_alone() -> None:
    core, clock, _ = _core(4)
    trace = [_request(0.0, adapter=i) for i in range(4)]
    first, second = _run(core, clock, trace), _run(core, clock, trace)
    assert first.counters["adapter_installs"] == 4
    assert second.counters["adapter_installs"] == 0
    assert first.counters["finished_requests"] == second.counters["finished_requests"] == 4


def test_adapters_in_a_step_are_counted_once_each() -> None:
    core, clock, _ = _core(2)
    trace = [_request(0.0, adapter=a, output=8) for a in (0, 1, 1, None)]
    result = _run(core, clock, trace)
    assert {step.num_adapters for step in result.work} == {2}
    assert result.steps["decode_adapters"] == 2.0
    assert result.steps["decode_rows"] == 4.0
    assert sum(step.num_tokens for step in result.work) == result.counters["computed_tokens"]


def test_what_is_given_up_has_its_error_and_leaves_the_core_idle() -> None:
    core, clock, _ = _core()
    trace = [_request(0.0, output=2), _request(0.0, output=50), _request(90.0)]
    outcomes = _run(core, clock, trace, give_up_s=10.0).outcomes
    assert [o.error_kind for o in outcomes] == [None, "given_up", "given_up"]
    assert outcomes[1].num_output_tokens == 10
    assert outcomes[2].sent_s is None
    assert core.is_idle
    core.check_integrity()


def test_a_refusal_is_an_outcome_with_its_reason() -> None:
    core, clock, _ = _core(max_num_waiting=1)
    outcomes = _run(core, clock, [_request(0.0) for _ in range(3)]).outcomes
    assert [o.error_kind for o in outcomes] == [None, "QueueFull", "QueueFull"]
    assert outcomes[1].retry_after_s is not None and outcomes[1].retry_after_s > 0


def test_a_dead_engine_ends_the_run() -> None:
    core, clock, runner = _core()

    def fault(batch: ScheduledBatch) -> None:
        raise ZeroDivisionError("a fault")

    runner.before_execute = fault
    with pytest.raises(ReplayError, match="a fault"):
        _run(core, clock, [_request(0.0)])
