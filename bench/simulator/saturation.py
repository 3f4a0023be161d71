"""What a simulated engine serves when it always has more than it can take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.clock import SimulatedClock
from bench.replay import Replay
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import EngineDescription, register, simulated_core
from bench.trace import Request


def saturated_rate(
    engine: EngineDescription,
    model: DeviceModel,
    *,
    inputs: tuple[int, int],
    outputs: tuple[int, int],
    ranks: Sequence[int] = (),
    num_requests: int = 400,
    seed: int = 1,
) -> float:
    """Requests a second, from the moment a tenth has ended to that at which the last one begins:
    neither the first, cold steps count nor the last, emptying ones.

    Requests go uniformly to adapters of `ranks`, which lie in host memory; without, to the base.
    Lengths are uniform over [from, to).
    """
    rng, clock = np.random.RandomState(seed), SimulatedClock()
    core = simulated_core(engine, model, clock)
    register(core, ranks)
    requests = [
        Request(
            arrival_s=0.0, adapter=int(rng.randint(len(ranks))) if ranks else None, tenant="",
            num_prompt_tokens=int(rng.randint(*inputs)),
            num_output_tokens=int(rng.randint(*outputs)),
        )
        for _ in range(num_requests)
    ]  # fmt: skip
    outcomes = Replay(
        core, requests, clock, vocab_size=engine.scheduler.vocab_size,
        prompt=lambda i, r: [0] * r.num_prompt_tokens,
    ).run().outcomes  # fmt: skip
    ends = np.sort([o.ended_s for o in outcomes])
    from_s = ends[num_requests // 10]
    to_s = max(o.first_token_s or 0.0 for o in outcomes)
    if to_s <= from_s:
        raise ValueError(f"num_requests: got {num_requests}, allowed: more than fit at once")
    return float(((ends > from_s) & (ends <= to_s)).sum() / (to_s - from_s))
