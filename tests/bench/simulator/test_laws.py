"""What must hold of any simulation, whatever the device costs."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.clock import SimulatedClock
from bench.replay import Replay, ReplayResult
from bench.simulator.cost import Cost
from bench.simulator.device_model import DeviceModel, constant
from bench.simulator.engine import AdapterSizes, EngineDescription, register, simulated_core
from bench.simulator.host_tier import HostTier
from bench.simulator.replica import Replica
from bench.trace import Request
from tests.bench.simulator.engines import description, device, trace


class WatchedClock(SimulatedClock):
    """Remembers every moment that it was asked to sleep until."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[float] = []

    def sleep_until(self, at_s: float) -> None:
        assert not math.isnan(at_s)
        super().sleep_until(at_s)
        self.moments.append(self.now())


def replay(
    engine: EngineDescription, model: DeviceModel, requests: list[Request], num_adapters: int = 0
) -> tuple[ReplayResult, WatchedClock]:
    clock = WatchedClock()
    core = simulated_core(engine, model, clock)
    register(core, [4 << i % 3 for i in range(num_adapters)])
    result = Replay(
        core, requests, clock, vocab_size=512, prompt=lambda i, r: [0] * r.num_prompt_tokens,
        keeps_moments=True,
    ).run()  # fmt: skip
    core.check_integrity()
    return result, clock


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.sampled_from((2.0, 40.0, 400.0)))
def test_time_never_goes_back_and_every_request_ends_once(seed: int, rate: float) -> None:
    requests = trace(seed, 30, rate, 8)
    result, clock = replay(description(num_pages=120, max_model_len=128), device(), requests, 8)
    assert clock.moments == sorted(clock.moments)
    assert result.counters["finished_requests"] == len(requests)
    for request, outcome in zip(requests, result.outcomes, strict=True):
        assert outcome.error is None
        assert outcome.num_output_tokens == request.num_output_tokens
        assert outcome.token_s == sorted(outcome.token_s or [])
        assert outcome.first_token_s is not None
        assert outcome.first_token_s > request.arrival_s


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_simulation_is_the_same_every_time(seed: int) -> None:
    requests = trace(seed, 30, 50.0, 8)
    first, _ = replay(description(), device(), requests, 8)
    second, _ = replay(description(), device(), requests, 8)
    assert first == second


def test_on_an_infinitely_fast_device_the_first_token_comes_at_arrival() -> None:
    requests = trace(5, 50, 20.0, 8)
    result, _ = replay(description(), constant(0.0), requests, 8)
    for outcome in result.outcomes:
        assert outcome.first_token_s == outcome.last_token_s == outcome.arrival_s


def test_a_request_alone_takes_its_steps_and_the_hosts_time() -> None:
    request = trace(0, 1, 1.0, 0)[0]
    result, _ = replay(description(max_num_batched_tokens=64), constant(0.01), [request])
    (outcome,) = result.outcomes
    assert outcome.first_token_s == pytest.approx(request.arrival_s + 0.01, abs=1e-6)
    assert outcome.last_token_s == pytest.approx(
        request.arrival_s + 0.01 * request.num_output_tokens, abs=1e-6
    )


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_single_row_with_constant_steps_is_an_m_d_1_queue(load: float) -> None:
    """Mean waiting time load / (2 (1 - load)) of a service time: Pollaczek and Khinchine."""
    service_s, num = 0.01, 30_000
    rng = np.random.RandomState(7)
    arrivals = np.round(np.cumsum(rng.exponential(service_s / load, num)), 6)
    replica = Replica(
        description(max_num_seqs=1), constant(service_s), lambda adapter: 8,
        tier=HostTier.unlimited(),
    )  # fmt: skip
    for index, arrival in enumerate(arrivals.tolist()):
        replica.send(
            index,
            Request(arrival_s=arrival, adapter=None, tenant="a", num_prompt_tokens=1,
                    num_output_tokens=1),
        )  # fmt: skip
    replica.run_until(math.inf)
    firsts = np.array([replica.ended[i].first_token_s for i in range(num)], float)
    waits = firsts - service_s - arrivals
    assert waits.min() > -1e-6
    expected = load / (2 * (1 - load)) * service_s
    assert waits.mean() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("travel_s", "delay_s"), [(0.008, 0.0), (0.05, 0.04)])
def test_pages_sent_ahead_travel_beside_one_step(travel_s: float, delay_s: float) -> None:
    """The first step waits for its own adapter, of half the size, which nobody could send ahead.
    The second request's leaves with that step, in which it waits, and is installed by the next.
    """
    engine = description(max_num_seqs=1)
    sizes = AdapterSizes(engine.model, engine.layout)
    num_bytes = sizes.packed("", 8).num_bytes
    late_s = travel_s * sizes.packed("", 4).num_bytes / num_bytes
    model = DeviceModel(
        device=Cost({"step": 0.01}), execute=Cost({}), between=Cost({}),
        bus_bytes_per_s=num_bytes / travel_s, bus_latency_s=0.0,
    )  # fmt: skip
    requests = [
        Request(arrival_s=0.0, adapter=a, tenant="a", num_prompt_tokens=4, num_output_tokens=20)
        for a in (0, 1)
    ]
    first, second = replay(engine, model, requests, 2)[0].outcomes
    assert first.first_token_s == pytest.approx(late_s + 0.01)
    assert first.last_token_s == pytest.approx(late_s + 0.2 + delay_s)
    assert second.first_token_s == pytest.approx(late_s + 0.21 + delay_s)


def test_no_jax_is_imported() -> None:
    code = (
        "import sys, bench.simulator.fit, bench.simulator.validate, bench.simulator.replica, "
        "bench.step_trace; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
