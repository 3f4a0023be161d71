"""Passing over steps changes no moment of any request, under any load and any pool."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.clock import SimulatedClock
from bench.replay import Replay
from bench.simulator.engine import EngineDescription, register, simulated_core
from bench.simulator.host_tier import HostTier
from bench.simulator.replica import Replica
from bench.trace import Request
from tests.bench.simulator.engines import description, device, trace


def run(
    engine: EngineDescription, requests: list[Request], is_fast: bool, window_s: float
) -> Replica:
    replica = Replica(
        engine, device(), lambda adapter: 4 << adapter % 3, tier=HostTier.unlimited(),
        is_fast=is_fast,
    )  # fmt: skip
    for index, request in enumerate(requests):
        replica.send(index, request)
    end_s = 0.0
    while replica.num_open:
        end_s += window_s
        replica.run_until(end_s)
        replica.core.check_integrity()
    return replica


def state(replica: Replica) -> dict[str, object]:
    stats = replica.core.stats()
    del stats["step"]  # of steps passed over none is measured; nothing here asks how long they take
    return stats | {"now_s": replica.clock.now()}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from((3.0, 30.0, 300.0)),
    num_adapters=st.sampled_from((0, 1, 12)),
    num_pages=st.sampled_from((70, 150, 2000)),
    rows=st.sampled_from((1, 4, 9)),
    window_s=st.sampled_from((0.01, 0.3, 1e9)),
)
def test_fast_forward_equals_step_by_step(
    seed: int, rate: float, num_adapters: int, num_pages: int, rows: int, window_s: float
) -> None:
    engine = description(
        num_pages=num_pages, max_num_seqs=rows, max_model_len=128, max_num_batched_tokens=32,
        max_adapter_slots=5,
    )  # fmt: skip
    requests = trace(seed, 25, rate, num_adapters)
    slow = run(engine, requests, False, window_s)
    fast = run(engine, requests, True, window_s)
    assert fast.ended == slow.ended
    assert state(fast) == state(slow)


def test_most_steps_of_long_answers_are_passed_over() -> None:
    requests = trace(1, 20, 2.0, 3, output=(100, 200))
    replica = run(description(), requests, True, 1e9)
    assert replica.fast_forward is not None
    assert replica.fast_forward.num_steps > 0.7 * replica.core.stats()["steps"]


def test_a_scheduler_that_is_not_the_plain_one_is_stepped() -> None:
    replica = Replica(description(), device(), lambda adapter: 8, tier=HostTier.unlimited())

    class Other(type(replica.core._scheduler)):  # type: ignore[misc]
        pass

    replica.core._scheduler.__class__ = Other
    assert replica.fast_forward is not None
    assert not type(replica.fast_forward)(replica.core).applies


@pytest.mark.parametrize("rate", [5.0, 200.0])
def test_a_replica_and_a_replay_of_the_same_trace_agree(rate: float) -> None:
    engine, requests = description(), trace(3, 40, rate, 6)
    replica = run(engine, requests, True, 1e9)
    clock = SimulatedClock()
    core = simulated_core(engine, device(), clock)
    register(core, [4 << i % 3 for i in range(6)])
    replayed = Replay(
        core, requests, clock, vocab_size=512, prompt=lambda i, r: [0] * r.num_prompt_tokens
    ).run()

    for index, outcome in enumerate(replayed.outcomes):
        ended = replica.ended[index]
        assert ended.first_token_s == pytest.approx(outcome.first_token_s, abs=1e-6)
        assert ended.last_token_s == pytest.approx(outcome.last_token_s, abs=1e-6)
        assert ended.num_output_tokens == outcome.num_output_tokens
