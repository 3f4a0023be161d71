"""Sweeps as runs of the simulator: their steps again, a model from some, the others predicted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench.points import EngineSpec, Point
from bench.records import RecordError, read_records
from bench.shards import QUICK, SHARDS
from bench.simulator.cost import Cost
from bench.simulator.device_model import DeviceModel
from bench.simulator.fit_sweeps import chosen, fit
from bench.simulator.run_file import RecordedRun
from bench.simulator.sweep_points import simulate_shard
from bench.simulator.sweep_runs import can_simulate, fit_intervals, intervals, read_runs
from bench.simulator.validation import compare

RESULTS = Path(__file__).parents[3] / "bench" / "results" / "nvidia-h200"
FITTED = ["base S2 n=0 full", "sloraj S2 n=200 full", "base S2 n=0 24 GB"]
B7 = EngineSpec(geometry="llama-7b")
KNOWN = DeviceModel(
    device=Cost({"bucket:decode-64": 5e-3, "bucket:mixed-2048": 0.04, "context_tokens": 1e-7,
                 "decode:attention": 1e-3, "mixed:attention": 2e-3}),
    execute=Cost({}), between=Cost({}), bus_bytes_per_s=20e9, bus_latency_s=0.0,
    origin={"geometry": "llama-7b", "device": "imaginary", "runs": ["none"]},
)  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> list[RecordedRun]:
    return [run for path in sorted((RESULTS / "sweeps").glob("*.jsonl")) for run in read_runs(path)]


def test_a_point_is_what_its_record_says() -> None:
    for point in (point for points in (*SHARDS.values(), QUICK) for point in points):
        again = Point.of(json.loads(json.dumps(point.record())))
        assert again == point and again.key == point.key


def test_scheduling_again_gives_the_very_steps_that_were_measured(
    measured: list[RecordedRun],
) -> None:
    for run in chosen(measured, ["base S2 n=0 full", "no-unify-mem S2 n=200 24 GB"]):
        found = intervals(run)
        num_steps = sum(
            value for one in found for name, value in one.columns.items() if name[:7] == "bucket:"
        )
        seen = [o.last_token_s for o in run.outcomes if o.last_token_s is not None]
        first = min(o.first_token_s for o in run.outcomes if o.first_token_s is not None)
        assert num_steps == pytest.approx(run.head["steps"]["steps"], abs=2)  # before the first
        assert sum(one.seconds for one in found) == pytest.approx(max(seen) - first)


def test_a_model_of_three_points_predicts_others(measured: list[RecordedRun]) -> None:
    names = ("step-7b", "step-7b-small", "offline-1000", "first-token")
    *steps, host, first = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)
    model = fit(chosen(measured, FITTED), steps, host, first)
    others = [
        "sloraj S2 n=1000 full",  # saturated
        "vtc S2 n=20 full load=0.6",  # few rows, and often none
        "first come S2 n=200 24 GB load=1.3",  # a queue that grows
    ]
    for run in chosen(measured, others):
        found = compare(run, model)
        assert found["throughput_error"] < 0.05, run.name
        assert found["first_token_error"] < 0.10, run.name


def test_fitting_finds_the_model_that_made_the_run(tmp_path: Path) -> None:
    points = [
        Point(figure="num-adapters", engine=B7, num_adapters=20, num_requests=60, base_requests=60)
    ]
    assert simulate_shard(points, KNOWN, tmp_path / "known.jsonl", "none") == 1
    base, with_adapters = read_runs(tmp_path / "known.jsonl")
    cost, errors = fit_intervals([*intervals(base), *intervals(with_adapters)])
    assert errors["predicted_over_observed"] == pytest.approx(1, abs=1e-3)
    assert errors["median_relative_error"] < 0.02
    wanted = KNOWN.device.coefficients["decode:attention"]
    assert cost.coefficients["decode:attention"] == pytest.approx(wanted, rel=0.1)
    found = compare(with_adapters, dataclasses.replace(KNOWN, device=cost))
    assert found["throughput_error"] < 0.005


def test_what_was_simulated_says_so_and_is_not_overwritten(tmp_path: Path) -> None:
    points = [
        Point(figure="rate", engine=B7, load=0.5, num_adapters=4, duration_s=2.0, base_requests=20),
        Point(figure="ablation", engine=B7, num_requests=20, pad_ranks=True),
    ]
    path = tmp_path / "x.jsonl"
    assert simulate_shard(points, KNOWN, path, "none") == 1  # padded ranks it cannot do
    head, (base, record) = read_records(path)
    assert head["device"] == "SIMULATED imaginary"
    assert base["point"]["figure"] == "base"
    assert record["base_rate"] == base["steady"]["requests_per_s"]
    with pytest.raises(RecordError, match="exists"):
        simulate_shard(points, KNOWN, path, "none")


def test_only_runs_whose_requests_came_at_once_are_fitted_on(measured: list[RecordedRun]) -> None:
    (run,) = chosen(measured, ["first come S2 n=200 24 GB load=1.3"])
    with pytest.raises(ValueError, match="got arrivals, allowed: a run whose requests came at"):
        intervals(run)
    with pytest.raises(ValueError, match="fit: got 'no such', allowed: base S1 n=0"):
        chosen(measured, ["no such"])


def test_other_kernels_merged_weights_and_padded_ranks_are_not_simulated() -> None:
    for change in ({"kernels": "bmm"}, {"merged_rank": 8}):
        engine = dataclasses.replace(B7, **change)
        assert not can_simulate(Point(figure="f", engine=engine, num_requests=1))
    assert not can_simulate(Point(figure="f", engine=B7, num_requests=1, pad_ranks=True))
    assert can_simulate(Point(figure="f", engine=B7, num_requests=1))
