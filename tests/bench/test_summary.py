import json
from pathlib import Path

import pytest

from bench.summary import collect, table, target, worst_target


def test_a_target_is_met_on_its_own_side_of_the_limit() -> None:
    assert target("6", "step", measured=8.5, limit=8.7, unit="ms")["met"]
    assert not target("6", "step", measured=8.8, limit=8.7, unit="ms")["met"]
    assert target("12", "base", measured=81, limit=80, unit="req/s", is_minimum=True)["met"]
    assert not target("12", "base", measured=79, limit=80, unit="req/s", is_minimum=True)["met"]


def test_of_several_the_one_furthest_from_its_limit_speaks() -> None:
    judged = [
        {"shape": "a", "us": 100.0, "limit_us": 90.0, "floor_us": 80.0},
        {"shape": "b", "us": 30.0, "limit_us": 20.0, "floor_us": 10.0},
        {"shape": "c", "us": 5.0, "limit_us": 5.0, "floor_us": 4.0},
    ]
    entry = worst_target("4", "products", judged, "shape", plural="shapes")
    assert entry["name"] == "products: 1 of 3 shapes in their limits, worst b"
    assert (entry["measured"], entry["floor"], entry["met"]) == (30.0, 10.0, False)
    assert worst_target("4", "products", judged[2:], "shape", plural="shapes")["met"]


def test_every_entry_names_its_command_device_and_commit(tmp_path: Path) -> None:
    origin = {"command": "python -m bench.step", "device": "NVIDIA H200", "commit": "abc"}
    late = target("12", "base", measured=81, limit=80, unit="req/s", is_minimum=True)
    early = target("3", "decode", measured=150, limit=148, unit="us", floor=133)
    (tmp_path / "a.json").write_text(json.dumps(origin | {"targets": [late]}))
    (tmp_path / "b.json").write_text(json.dumps(origin | {"targets": [early]}))
    (tmp_path / "c.json").write_text(json.dumps({"bench": "without targets"}))
    (tmp_path / "summary.json").write_text("[]")
    entries = collect(tmp_path)
    assert [(e["number"], e["raw"]) for e in entries] == [("3", "b.json"), ("12", "a.json")]
    assert all(entry["command"] == "python -m bench.step" for entry in entries)
    assert "| 3 | decode | 150 us | 133 | at most 148 | **no** |" in table(entries)


def test_a_target_without_an_origin_is_refused(tmp_path: Path) -> None:
    entry = target("1", "x", measured=1, limit=2, unit="us")
    (tmp_path / "a.json").write_text(json.dumps({"targets": [entry]}))
    with pytest.raises(KeyError, match="command"):
        collect(tmp_path)
