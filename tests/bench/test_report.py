"""The report says what was measured and what was not, and judges it as the targets have it."""

from __future__ import annotations

import dataclasses
import html.parser
import json
from pathlib import Path
from typing import Any

import pytest

from bench import paper
from bench.points import Point
from bench.report import SECTIONS, make_report
from bench.report_plots import Line, Panel, draw
from bench.report_rows import missing, pick, rows_of
from bench.report_targets import targets
from bench.shards import SHARDS
from bench.summary import collect
from bench.sweep_bases import base_of

POINT = next(p for p in SHARDS["core-7b"] if p.setting == "S2" and p.num_adapters == 200)


def _record(point: Point, per_s: float, **more: Any) -> dict[str, Any]:
    """A record as the sweeps write it, of a run that finished `per_s` requests a second."""
    num = point.num_requests or 100
    slo = {"attainment": more.pop("attainment", 1.0), "satisfaction": 0.9, "goodput": per_s}
    return {
        "key": point.key, "point": point.record(), "file": "x", "device": "a GPU", "commit": "c0",
        "summary": {
            "requests_per_s": per_s, "num_requests": num, "num_finished": num, "wall_s": num,
            "first_token_s": {"mean": 1.0, "p99": 2.0}, "slo": {"6s": slo, "1s": slo},
        },
        "steady": {"requests_per_s": 1.1 * per_s}, "offered_rate": 1.0, "ceiling": 0.9,
        "counters": {"adapter_installs": 7}, "steps": {"decode_adapters": 3.0},
        "requests": _requests([]),
    } | more  # fmt: skip


def _requests(first_s: list[tuple[str, float]]) -> dict[str, list[Any]]:
    num = len(first_s)
    return {
        "tenant": [tenant for tenant, _ in first_s], "adapter": [0] * num,
        "num_prompt_tokens": [1] * num, "num_wanted_tokens": [1] * num, "arrival_s": [0.0] * num,
        "first_token_s": [s for _, s in first_s], "num_output_tokens": [1] * num,
        "ended_s": [s for _, s in first_s],
    }  # fmt: skip


def test_retention_is_over_the_base_of_the_same_file_and_pool() -> None:
    capped = dataclasses.replace(POINT, pool_gb=24.0)
    records = [
        _record(base_of(POINT), 40.0), _record(POINT, 30.0),
        _record(base_of(capped), 10.0), _record(capped, 4.0),
        _record(POINT, 20.0, file="another"),
    ]  # fmt: skip
    assert [row.retention for row in rows_of(records)] == [0.75, 0.4, None]


def test_where_the_base_drained_otherwise_saturated_rates_are_compared() -> None:
    short = dataclasses.replace(POINT, num_requests=100)
    (row,) = rows_of([_record(base_of(POINT), 40.0), _record(short, 10.0, steady=None)])
    assert row.retention is None
    (row,) = rows_of([_record(base_of(POINT), 40.0), _record(short, 20.0)])
    assert row.retention == pytest.approx(22 / 44)


def test_what_was_not_measured_is_named_and_what_failed_says_why() -> None:
    keys = {p.key for points in SHARDS.values() for p in points if p.figure == POINT.figure}
    assert set(missing([], POINT.figure)) == keys
    failed = _record(POINT, 1.0) | {"summary": None, "error": "too small"}
    assert f"{POINT.key}: too small" in missing([failed], POINT.figure)
    assert len(missing([_record(POINT, 1.0)], POINT.figure)) == len(keys) - 1


def test_every_figure_of_the_grid_has_its_section(tmp_path: Path) -> None:
    shown = {make([], []).figure for make in SECTIONS}
    assert {point.figure for points in SHARDS.values() for point in points} <= shown


def test_an_empty_folder_makes_a_report_of_the_papers_numbers_alone(tmp_path: Path) -> None:
    result = make_report(tmp_path)
    assert result["targets"] == []
    page = (tmp_path / "report.md").read_text()
    assert "No point has been measured." in page
    for setting in paper.TABLE_3.values():
        for values in setting.values():
            assert all(f"{value:.2f}" in page for value in values.values() if value is not None)
    parser = html.parser.HTMLParser()
    parser.feed((tmp_path / "report.html").read_text())


@pytest.mark.parametrize(
    ("per_s", "met"), [(40 * 0.9 * 0.93, True), (40 * 0.9 * 0.91, False)], ids=["above", "below"]
)
def test_retention_is_judged_by_its_ceiling(per_s: float, met: bool) -> None:
    found = targets(rows_of([_record(base_of(POINT), 40.0), _record(POINT, per_s)]))
    of_ceiling, absolute = found
    assert of_ceiling["number"] == "C1" and of_ceiling["met"] == met
    assert of_ceiling["measured"] == pytest.approx(per_s / 36)
    assert absolute["measured"] == pytest.approx(per_s / 40) and absolute["met"]


def test_what_is_simulated_says_so_and_meets_no_target(tmp_path: Path) -> None:
    path = tmp_path / "simulated-beyond.json"
    points = [
        {"setting": s, "gpus": n, "adapters": a, "kind": k, "requests_per_s": v}
        for s, n, a, k, v in (
            ("S2", 1, 0, "base", 30.0), ("S2", 1, 2000, "adapters", 27.0),
            ("S6", 4, 10, "base", 20.0), ("S6", 4, 10, "adapters", 15.0),
        )
    ]  # fmt: skip
    path.write_text(json.dumps({"points": points}))
    (tmp_path / "sweeps").mkdir()
    assert make_report(tmp_path / "sweeps")["targets"] == []
    page = (tmp_path / "sweeps" / "report.md").read_text()
    assert "| S2 | 1 | 2000 | adapters | 27.00 | 90.0 % |" in page
    assert "| S6 | 4 | 10 | adapters | 15.00 | 75.0 % |" in page
    assert page.count("## SIMULATED") == 2
    assert (tmp_path / "sweeps" / "plots" / "simulated-adapters.png").exists()


def test_unified_paging_is_judged_against_halves_and_against_the_best_split() -> None:
    points = {
        p.system: p for name in ("core-7b", "capped-7b") for p in SHARDS[name] if p.pool_gb == 24.0
    }
    records = [
        _record(points["sloraj"], 13.0), _record(points["no-unify-mem"], 8.0),
        _record(points["no-unify-mem, a quarter"], 11.0),
    ]  # fmt: skip
    best, halves = targets(rows_of(records))
    assert halves["measured"] == pytest.approx(13 / 8) and halves["met"]
    assert best["measured"] == pytest.approx(13 / 11) and not best["met"]
    (only,) = targets(rows_of(records[:2]))
    assert only["name"].endswith("over no-unify-mem, halves as the paper's")


def test_attainment_is_judged_by_the_best_other_at_each_objective() -> None:
    """_record gives one share for both objectives."""
    shares = {
        "sloraj": 0.8, "sloraj, for 1 s": 0.7, "the paper's": 0.6, "the paper's, for 1 s": 0.75,
        "strictly fair": 0.9,
    }  # fmt: skip
    points = [p for name in ("abort", "abort-1s") for p in SHARDS[name] if p.load == 1.3]
    slos = {name: {"attainment": share} for name, share in shares.items()}
    records = [
        _record(p, 1.0) | {"summary": _record(p, 1.0)["summary"] | {"slo": {"6s": s, "1s": s}}}
        for p in points
        if p.system in shares
        for s in [slos[p.system]]
    ]
    found = {entry["name"]: entry for entry in targets(rows_of(records))}
    best = "the paper's, for 1 s the best of the others"
    six = found[f"first tokens within 6 s at load 1.3, {best}"]
    one = found[f"first tokens within 1 s at load 1.3, {best}"]
    assert (six["measured"], six["met"]) == (0.8, True)
    assert (one["measured"], one["met"]) == (0.7, False)


def test_the_flood_is_judged_by_the_other_tenants() -> None:
    points = [p for p in SHARDS["fairness"] if p.system == "vtc"]
    calm, flooded = sorted(points, key=lambda p: p.flood or 0)
    calm_s = _requests([("adapter-0", 9.0), ("adapter-1", 1.0), ("adapter-2", 2.0)])
    flooded_s = _requests([("adapter-0", 99.0), ("adapter-1", 3.0), ("adapter-2", 6.0)])
    records = [
        _record(calm, 1.0, requests=calm_s),
        _record(flooded, 1.0, requests=flooded_s),
    ]
    (found,) = targets(rows_of(records))
    assert found["measured"] == pytest.approx(3.0, rel=0.01) and not found["met"]


def test_an_order_that_promises_no_fairness_is_shown_and_not_judged() -> None:
    points = [p for p in SHARDS["fairness"] if p.system == "first come"]
    some_s = _requests([("adapter-0", 9.0), ("adapter-1", 1.0)])
    rows = rows_of([_record(point, 1.0, requests=some_s) for point in points])
    assert not targets(rows)


def test_targets_reach_the_summary_in_their_order(tmp_path: Path) -> None:
    entry = {"name": "n", "measured": 1, "unit": "", "floor": None, "target": "t", "met": True}
    result = {"command": "c", "device": "d", "commit": "e"}
    for i, number in enumerate(("C2", "10", "C1", "9")):
        (tmp_path / f"{i}.json").write_text(
            json.dumps(result | {"targets": [entry | {"number": number}]})
        )
    assert [e["number"] for e in collect(tmp_path)] == ["9", "10", "C1", "C2"]


def test_a_picture_of_nothing_is_not_drawn(tmp_path: Path) -> None:
    nothing = Panel(title="t", x_label="x", y_label="y", lines=[Line(name="a", points={})])
    assert not draw([nothing], tmp_path / "x.png")
    assert draw([dataclasses.replace(nothing, bars={"g": {"a": 1.0}})], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_picked_by_the_fields_of_their_points() -> None:
    records = [_record(point, 1.0) for point in SHARDS["retention-7b"]]
    found = pick(rows_of(records), "num-adapters", setting="S1")
    assert [row.num_adapters for row in found] == [1000, 2000]
