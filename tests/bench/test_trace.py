"""Traces are merged, stretched, cut to measure and summed up without losing a request."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.trace import (
    Request,
    adapters_by_tenant,
    at_rate,
    default_tenant,
    digest,
    downsample,
    merge,
    prompt_token_ids,
    rate,
    summarise,
)
from bench.workloads import Workload, generate

CROWD = generate(Workload(rate=50.0, duration_s=20.0, num_adapters=30))


def request(arrival_s: float, adapter: int | None = 0, prompt: int = 8, output: int = 8) -> Request:
    return Request(
        arrival_s=arrival_s, adapter=adapter, tenant=default_tenant(adapter),
        num_prompt_tokens=prompt, num_output_tokens=output,
    )  # fmt: skip


TRACES = st.lists(  # times of eighths, which floats hold exactly
    st.tuples(st.integers(0, 400), st.sampled_from([None, 0, 1, 2, 3])), min_size=1, max_size=40
).map(lambda pairs: [request((t + 1) / 8, a) for t, a in sorted(pairs, key=lambda p: p[0])])


def test_a_merged_trace_has_every_request_once_in_order() -> None:
    flood = generate(Workload(rate=200.0, duration_s=5.0, num_adapters=1, seed=7))
    both = merge(CROWD, flood)
    assert collections.Counter(both) == collections.Counter(CROWD) + collections.Counter(flood)
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(both))


def test_stretching_changes_the_rate_and_nothing_but_times() -> None:
    stretched = at_rate(CROWD, 10.0)
    assert rate(stretched) == pytest.approx(10.0, rel=1e-6)
    for before, after in zip(CROWD, stretched, strict=True):
        assert dataclasses.replace(after, arrival_s=before.arrival_s) == before
        ratio = rate(CROWD) / 10.0
        assert after.arrival_s == pytest.approx(before.arrival_s * ratio, abs=1e-6)


@pytest.mark.parametrize("trace", [[], [request(0.0)]], ids=["empty", "one-moment"])
def test_a_trace_of_one_moment_has_no_rate(trace: list[Request]) -> None:
    with pytest.raises(ValueError, match="has no rate"):
        rate(trace)


def test_downsampling_keeps_a_random_part_of_what_fits_and_fills_the_time() -> None:
    part = downsample(CROWD, requests_per_s=5.0, duration_s=60.0, max_prompt_tokens=400)
    assert len(part) == 300
    assert (part[0].arrival_s, part[-1].arrival_s) == (0.0, 60.0)
    assert max(r.num_prompt_tokens for r in part) <= 400
    shape = [(r.adapter, r.num_prompt_tokens, r.num_output_tokens) for r in part]
    whole = iter((r.adapter, r.num_prompt_tokens, r.num_output_tokens) for r in CROWD)
    assert all(one in whole for one in shape)  # a subsequence: the order is kept
    other = downsample(CROWD, requests_per_s=5.0, duration_s=60.0, max_prompt_tokens=400, seed=1)
    assert other != part


def test_downsampling_refuses_to_make_requests_up() -> None:
    with pytest.raises(ValueError, match=r"1001 requests, allowed: 2 to the 1000 of 1000"):
        downsample(CROWD, requests_per_s=1001.0, duration_s=1.0)


def test_every_tenant_gets_an_adapter_in_order_of_appearance() -> None:
    trace = [dataclasses.replace(request(i), tenant=t) for i, t in enumerate("baab")]
    assert [r.adapter for r in adapters_by_tenant(trace)] == [0, 1, 1, 0]


def test_prompts_are_uniform_over_the_vocabulary_and_share_no_beginning() -> None:
    prompts = [prompt_token_ids(42, index, 256, 32000) for index in range(200)]
    drawn = np.concatenate(prompts)
    assert drawn.min() >= 3 and drawn.max() < 32000
    middle, spread = (3 + 31999) / 2, 31997 / np.sqrt(12)
    assert drawn.mean() == pytest.approx(middle, abs=5 * spread / np.sqrt(drawn.size))
    beginnings = {tuple(prompt[:4]) for prompt in prompts}
    assert len(beginnings) == len(prompts)


def test_a_prompt_is_the_same_for_its_place_and_seed_and_grows_at_its_end() -> None:
    assert prompt_token_ids(42, 7, 6, 32000).tolist() == [30893, 17057, 12114, 10500, 14913, 28273]
    assert (prompt_token_ids(42, 7, 6, 32000) == prompt_token_ids(42, 7, 60, 32000)[:6]).all()
    assert (prompt_token_ids(42, 7, 6, 32000) != prompt_token_ids(43, 7, 6, 32000)).any()


@given(TRACES, st.integers(1, 100).map(lambda eighths: eighths / 8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_distinct_adapters_are_counted_as_looking_at_every_moment_would(
    trace: list[Request], window_s: float
) -> None:
    summary = summarise(trace, window_s=window_s)
    middles = np.arange(0, round(trace[-1].arrival_s * 8)) / 8 + 1 / 16  # edges are eighths
    seen = [
        {r.adapter for r in trace if now - window_s < r.arrival_s <= now} - {None}
        for now in middles
    ]
    at_arrivals = [
        {r.adapter for r in trace if now - window_s < r.arrival_s <= now} - {None}
        for now in (last.arrival_s for last in trace)
    ]
    assert summary["distinct_adapters"]["mean"] == pytest.approx(np.mean([len(s) for s in seen]))
    assert summary["distinct_adapters"]["max"] == max(len(s) for s in at_arrivals)


def test_distinct_adapters_in_a_poisson_trace_are_as_many_as_expected() -> None:
    workload = Workload(rate=40.0, duration_s=1000.0, num_adapters=100, zipf=1.0)
    summary = summarise(generate(workload), window_s=5.0)
    weights = 1 / np.arange(1, 101)
    expected = (1 - np.exp(-40.0 * 5.0 * weights / weights.sum())).sum()
    # one window's count has a variance below 100/4; some 200 windows of 5 s are independent
    assert summary["distinct_adapters"]["mean"] == pytest.approx(expected, abs=5 * 5 / 200**0.5)


def test_a_summary_adds_up_and_normalises_load() -> None:
    trace = [request(1.0, 0, 10, 4), request(2.0, 1, 20, 6), request(4.0, None, 30, 8)]
    summary = summarise(trace, window_s=1.5, saturated_rate=3.0)
    assert summary["requests_per_s"] == 0.75 and summary["load"] == 0.25
    assert summary["prompt_tokens_per_s"] == 15.0 and summary["output_tokens_per_s"] == 4.5
    assert summary["peak_rate"] == pytest.approx(2 / 1.5)
    assert summary["base_share"] == pytest.approx(1 / 3)
    assert (summary["num_adapters"], summary["num_tenants"]) == (2, 3)
    assert summary["top_adapter_share"] == pytest.approx(1 / 3)
    assert summarise(trace)["load"] is None
    assert summarise(trace, window_s=1.0)["peak_rate"] == 1.0  # [t, t + 1) holds one of 1, 2, 4


def test_a_digest_tells_any_two_traces_apart() -> None:
    names = {digest(CROWD), digest(CROWD[:-1]), digest(at_rate(CROWD, 49.0))}
    changed = [dataclasses.replace(CROWD[0], num_output_tokens=1), *CROWD[1:]]
    assert len(names | {digest(changed)}) == 4
    assert digest(list(CROWD)) == digest(CROWD)
