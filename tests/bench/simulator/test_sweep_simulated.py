"""Simulated points are records of a sweep that a report tells from measured ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench import sweep_simulated
from bench.points import EngineSpec, Point
from bench.report_rows import rows_of
from bench.sweep import read_all
from bench.sweep_simulated import describe
from tests.bench.simulator.test_scaling import fitted

SMALL = EngineSpec(geometry="llama-7b", max_num_seqs=4, max_num_batched_tokens=64)
POINTS = [
    Point(
        figure="tensor-parallel", engine=dataclasses.replace(SMALL, tensor_parallel_size=tp),
        setting="S2", num_adapters=6, num_requests=20, base_requests=20, input_range=(4, 40),
        output_range=(4, 20),
    )
    for tp in (1, 2)
]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, points: list[Point]) -> None:
    fitted().save(folder / "m.json")
    monkeypatch.setattr(sweep_simulated, "SIMULATED", points)
    monkeypatch.setattr(
        "sys.argv", ["x", "--model", str(folder / "m.json"), "--out", str(folder), "--commit", "x"]
    )
    sweep_simulated.main()


def test_points_are_recorded_once_each_beside_their_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path, POINTS)
    run(monkeypatch, tmp_path, POINTS)  # and not again
    records = read_all(tmp_path)
    assert sorted(r["point"]["figure"] for r in records) == ["base"] * 2 + ["tensor-parallel"] * 2
    rows = rows_of(records)
    assert all(row.is_simulated and row.is_measured for row in rows)
    assert all(str(row.record["device"]).startswith("simulated") for row in rows)
    one, two = sorted(rows, key=lambda row: row.engine["tensor_parallel_size"])
    assert 0 < (one.retention or 0) <= 1 and one.requests_per_s != two.requests_per_s
    assert "tensor-parallel" in capsys.readouterr().out


def test_a_cap_and_policies_reach_the_engine() -> None:
    (point, _) = POINTS
    capped = dataclasses.replace(point, pool_gb=24.0, policies=(("max_num_waiting", 7),))
    assert describe(capped).scheduler.num_pages < describe(point).scheduler.num_pages
    assert describe(capped).scheduler.max_num_waiting == 7


def test_what_has_no_model_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = dataclasses.replace(POINTS[0], pad_ranks=True)
    with pytest.raises(ValueError, match="pad_ranks"):
        describe(padded)
    run(monkeypatch, tmp_path, [padded])
    (record,) = [r for r in read_all(tmp_path) if r["point"]["figure"] != "base"]
    assert "pad_ranks" in record["error"]
