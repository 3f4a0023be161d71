"""Single steps and idle first tokens as observations: what made them is found again."""

from __future__ import annotations

from typing import Any

import pytest

from bench.points import EngineSpec, Point
from bench.simulator.cost import Cost
from bench.simulator.engine import EngineDescription
from bench.simulator.step_results import WEIGHT, idle_host_s, step_intervals
from bench.simulator.sweep_runs import fit_intervals, point_engine

DEVICE = Cost(
    {"bucket:decode-64": 4e-3, "bucket:mixed-256": 7e-3, "bucket:mixed-512": 11e-3,
     "bucket:mixed-1024": 22e-3, "context_tokens": 1e-7, "decode:adapter_elements": 3e-13,
     "mixed:adapter_products": 2e-14}
)  # fmt: skip
ELEMENTS = 32 * 4 * (4096 + 4096)  # of one rank on q, k, v, o of Llama-7B


@pytest.fixture(scope="module")
def engine() -> EngineDescription:
    point = Point(figure="f", engine=EngineSpec(geometry="llama-7b"), num_requests=1)
    return point_engine(point, 1000)


def _steps(cases: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    known = {"geometry": "llama-7b", "quantization": None, "context": 512, "steps": 20}
    return {"settings": known | {"max_num_batched_tokens": 2048} | settings, "cases": cases}


def test_a_step_has_the_features_of_the_batch_that_was_timed(engine: EngineDescription) -> None:
    case = {
        "rows": 64, "kind": "s2", "decode_step_s": 0.010, "mixed_step_s": 0.015,
        "prefill_tokens_per_s": 40_960.0,
    }  # fmt: skip
    decode, mixed, prefill = step_intervals(_steps([case]), engine)
    assert (decode.seconds, mixed.seconds, prefill.seconds) == (0.010, 0.015, 0.05)
    assert {decode.weight, mixed.weight, prefill.weight} == {WEIGHT}
    assert decode.columns["bucket:decode-64"] == 1
    assert decode.columns["context_tokens"] == 64 * (512 + 10 + 1)
    assert decode.columns["decode:adapter_elements"] == 16 * (64 + 32 + 16 + 8) * ELEMENTS
    assert decode.columns["decode:largest_elements"] == 64 * ELEMENTS
    assert mixed.columns["bucket:mixed-256"] == 1
    assert mixed.columns["prompt_pairs"] == 192 * 193 // 2
    in_mixed = (16 * (64 + 32 + 16 + 8) + 192 * 64) * ELEMENTS
    assert mixed.columns["mixed:adapter_products"] == in_mixed
    assert prefill.columns["bucket:mixed-2048"] == 1
    assert prefill.columns["mixed:adapter_products"] == 512 * (64 + 32 + 16 + 8) * ELEMENTS
    assert "context_tokens" not in prefill.columns


def test_the_base_has_no_adapters(engine: EngineDescription) -> None:
    (decode,) = step_intervals(
        _steps([{"rows": 1, "kind": "base", "decode_step_s": 0.004}]), engine
    )
    assert set(decode.columns) == {"bucket:decode-1", "context_tokens"}


def test_a_fit_to_steps_predicts_them(engine: EngineDescription) -> None:
    cases = [
        {"rows": rows, "kind": kind, "decode_step_s": seconds}
        for rows, kind, seconds in ((8, "base", 0.005), (8, "s2", 0.0054), (64, "base", 0.0085))
    ]
    found = step_intervals(_steps(cases), engine)
    cost, _ = fit_intervals(found)
    for one in found:
        known = sum(cost.coefficients.get(name, 0) * value for name, value in one.columns.items())
        assert known == pytest.approx(one.seconds, rel=1e-6)


def test_what_an_idle_engine_takes_besides_its_step_is_the_hosts(engine: EngineDescription) -> None:
    host_s = 0.0025
    cases = [
        {"rank": rank, "prompt": prompt, "warm_ms": 1e3 * (device_s + products + host_s)}
        for rank, prompt, device_s in ((8, 512, 11e-3), (64, 1024, 22e-3))
        for products in [2e-14 * rank * prompt * ELEMENTS]
    ]
    result = {"geometry": "llama-7b", "cases": cases}
    assert idle_host_s(result, DEVICE, engine) == pytest.approx(host_s)
    faster = {"geometry": "llama-7b", "cases": [cases[0] | {"warm_ms": 1.0}]}
    assert idle_host_s(faster, DEVICE, engine) == 0.0


def test_results_of_other_geometries_and_weights_are_refused(engine: EngineDescription) -> None:
    with pytest.raises(ValueError, match=r"steps: geometry: got 'llama-13b', allowed: 'llama-7b'"):
        step_intervals(_steps([], geometry="llama-13b"), engine)
    with pytest.raises(ValueError, match="steps: quantization: got 'int8', allowed: None"):
        step_intervals(_steps([], quantization="int8"), engine)
    with pytest.raises(ValueError, match="first tokens: geometry: got 'x', allowed: 'llama-7b'"):
        idle_host_s({"geometry": "x", "cases": []}, DEVICE, engine)
