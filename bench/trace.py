"""A trace: which requests arrive when, for whom, and how long they are. No text, no model.

`bench.workloads` generates traces, `bench.trace_files` reads and writes them; servers, engines
and simulators are all driven with the same ones. What a prompt says follows from its place in
the trace and a seed (`prompt_token_ids`): random token ids, so that no two prompts share a prefix
and no prefix cache answers for the engine.

    busy = merge(trace, flood)                       # one tenant floods the others
    half = at_rate(trace, 0.5 * saturated_rate)      # load, in parts of the base's saturated rate
    summarise(half, window_s=10)["load"]
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import heapq
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

BASE_TENANT = "base"
RESERVED_TOKENS = 3  # ids below are padding, begin and end in Llama's vocabulary


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. `arrival_s` counts from the start of the trace, in whole microseconds."""

    arrival_s: float
    adapter: int | None  # None: the base model
    tenant: str  # who is served, for fairness; may send to several adapters
    num_prompt_tokens: int
    num_output_tokens: int  # wanted: generation ignores the end-of-text token


Trace = Sequence[Request]  # in order of arrival


def default_tenant(adapter: int | None) -> str:
    """One tenant for each adapter, as in the paper."""
    return BASE_TENANT if adapter is None else f"adapter-{adapter}"


def merge(*traces: Trace) -> list[Request]:
    """All requests of the traces by arrival; of two at one moment, the earlier trace's first."""
    return list(heapq.merge(*traces, key=lambda request: request.arrival_s))


def rate(trace: Trace) -> float:
    """Requests per second that the trace offers, up to its last arrival."""
    if not trace or trace[-1].arrival_s <= 0:
        raise ValueError(f"a trace of {len(trace)} requests at one moment has no rate")
    return len(trace) / trace[-1].arrival_s


def at_rate(trace: Trace, requests_per_s: float) -> list[Request]:
    """The same requests in the same order with all times stretched to offer this rate."""
    if not requests_per_s > 0:
        raise ValueError(f"requests_per_s: got {requests_per_s}, allowed: above 0")
    stretch = rate(trace) / requests_per_s
    return [
        dataclasses.replace(request, arrival_s=round(request.arrival_s * stretch, 6))
        for request in trace
    ]


def downsample(
    trace: Trace,
    *,
    requests_per_s: float,
    duration_s: float,
    seed: int = 42,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> list[Request]:
    """A recorded trace made to measure, as the paper did with its own.

    Leaves out requests over the maxima, chooses int(requests_per_s * duration_s) of the others at
    random, and stretches their times to [0, duration_s]. (The original removes over-long requests
    from a list while walking it, and so keeps some of them; here all go.)
    """
    fitting = [
        request
        for request in trace
        if request.num_prompt_tokens <= (max_prompt_tokens or request.num_prompt_tokens)
        and request.num_output_tokens <= (max_output_tokens or request.num_output_tokens)
    ]
    wanted = int(requests_per_s * duration_s)
    if not 2 <= wanted <= len(fitting):
        raise ValueError(
            f"{requests_per_s} requests/s for {duration_s} s are {wanted} requests, "
            f"allowed: 2 to the {len(fitting)} of {len(trace)} that fit"
        )
    chosen = np.random.RandomState(seed).choice(len(fitting), wanted, replace=False)
    picked = [fitting[index] for index in np.sort(chosen)]
    start, span = picked[0].arrival_s, picked[-1].arrival_s - picked[0].arrival_s
    stretch = duration_s / span if span else 0.0
    return [
        dataclasses.replace(request, arrival_s=round((request.arrival_s - start) * stretch, 6))
        for request in picked
    ]


def adapters_by_tenant(trace: Trace) -> list[Request]:
    """Gives every tenant an adapter of its own, numbered as they first appear (as the paper did
    with the models of its chat trace).
    """
    numbers: dict[str, int] = {}
    return [
        dataclasses.replace(request, adapter=numbers.setdefault(request.tenant, len(numbers)))
        for request in trace
    ]


def prompt_token_ids(seed: int, index: int, num_tokens: int, vocab_size: int) -> np.ndarray:
    """The prompt of request `index` of a trace: int64 [num_tokens], uniform over the vocabulary
    without its first ids; the same on every platform and under every version of NumPy.
    """
    rng = np.random.RandomState([seed, index])
    return rng.randint(RESERVED_TOKENS, vocab_size, num_tokens, dtype=np.int64)


def digest(trace: Trace) -> str:
    """A short name of exactly this trace, for records."""
    lines = (json.dumps(dataclasses.astuple(request)) for request in trace)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def summarise(
    trace: Trace, *, window_s: float = 10.0, saturated_rate: float | None = None
) -> dict[str, Any]:
    """What a trace asks of a server.

    window_s: "distinct_adapters" are those with a request in the last `window_s` seconds, on
    average over the trace and at most; "peak_rate" is the highest rate over such a window.
    saturated_rate: requests/s of the base at saturation on the same lengths; the "load" is the
    offered rate in parts of it.
    """
    counts = collections.Counter(request.adapter for request in trace)
    by_adapter: dict[int, list[float]] = {}
    for request in trace:
        if request.adapter is not None:
            by_adapter.setdefault(request.adapter, []).append(request.arrival_s)
    mean, most = _distinct_in_window(list(by_adapter.values()), trace[-1].arrival_s, window_s)
    offered = rate(trace)
    prompts = sum(request.num_prompt_tokens for request in trace)
    outputs = sum(request.num_output_tokens for request in trace)
    return {
        "num_requests": len(trace),
        "duration_s": trace[-1].arrival_s,
        "requests_per_s": offered,
        "load": None if saturated_rate is None else offered / saturated_rate,
        "prompt_tokens_per_s": prompts / trace[-1].arrival_s,
        "output_tokens_per_s": outputs / trace[-1].arrival_s,
        "mean_prompt_tokens": prompts / len(trace),
        "mean_output_tokens": outputs / len(trace),
        "peak_rate": _most_in_window(trace, window_s) / window_s,
        "num_adapters": len(by_adapter),
        "num_tenants": len({request.tenant for request in trace}),
        "base_share": counts[None] / len(trace),
        "top_adapter_share": max(map(len, by_adapter.values()), default=0) / len(trace),
        "window_s": window_s,
        "distinct_adapters": {"mean": mean, "max": most},
        "digest": digest(trace),
    }


def _distinct_in_window(
    arrivals: list[list[float]], end_s: float, window_s: float
) -> tuple[float, int]:
    """Mean over [0, end_s) and maximum of how many lists have an entry in (t - window_s, t]."""
    edges: list[tuple[float, int]] = []  # +1 where an adapter comes in, -1 where it goes out
    for times in arrivals:
        begin = times[0]
        for time, after in zip(times, [*times[1:], float("inf")], strict=True):
            if after > time + window_s:
                edges += [(begin, 1), (time + window_s, -1)]
                begin = after
    edges.sort()  # at one moment, those that go out first
    now = most = 0
    total, before = 0.0, 0.0
    for time, change in edges:
        time = min(time, end_s)
        total += now * (time - before)
        now, before = now + change, time
        most = max(most, now)
    return total / end_s, most


def _most_in_window(trace: Trace, window_s: float) -> int:
    times = np.array([request.arrival_s for request in trace])
    first_after = np.searchsorted(times, times + window_s, side="left")
    return int((first_after - np.arange(len(times))).max())
