"""The tuner of the linear layer: what it tries can run, and what it writes is the fastest right."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest

from bench import kernels_linear, linear_cases, profile_step
from bench.linear_cases import DTYPES, SHAPES, Case, compile_all, describe, time_all
from bench.tune_linear import TUNED, cases, merged, table
from pallas_kernels import linear_mosaic as mosaic
from pallas_kernels.linear_triton import Config
from tests.bench.cpu_profile import cpu_events


def arguments(**changes: Any) -> argparse.Namespace:
    settings: dict[str, Any] = {
        "part": "0/1", "shapes": list(SHAPES), "dtypes": TUNED, "rows": [1, 64, 128, 256],
        "most": 4, "triton": 3, "xla_rows": [64], "lock": None, "threads": 2, "compile_s": 1e9,
        "stop_s": 1e9, "hang_s": 60,
    }  # fmt: skip
    return argparse.Namespace(**(settings | changes))


def test_candidates_fit_the_device_and_cover_every_shape() -> None:
    found = cases(arguments())
    for case in found:
        if isinstance(case.config, mosaic.Config):
            assert case.config.smem_bytes(case.num_rows, case.weight_bytes) <= mosaic.SMEM_BYTES
            assert case.sizes[1] % (case.config.block_in * case.config.split_in) == 0
    tried = {(c.shape, c.num_rows) for c in found if c.dtype == "int8" and c.config is not None}
    assert tried == {(shape, rows) for shape in SHAPES for rows in (1, 64, 128, 256)}
    assert {c.num_rows for c in found if c.config is None} == {64}
    parts = [cases(arguments(part=f"{i}/3")) for i in range(3)]
    assert sorted(map(str, found)) == sorted(str(case) for part in parts for case in part)


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_times_are_taken_under_a_lock_and_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(profile_step, "stream_events", cpu_events)
    monkeypatch.setattr(linear_cases, "SHAPES", {"o": (128, 64)})
    monkeypatch.setattr(linear_cases, "ROTATED_BYTES", 1e4)
    found = [Case("o", dtype, rows, None) for dtype in DTYPES for rows in (1, 5)]
    args, started = arguments(lock=tmp_path / "lock"), time.monotonic()
    groups = time_all(compile_all(found, args, started), args, started)
    results = [result for group in groups for result in group]
    assert [result["case"] for result in results] == found
    assert all(result["us"] > 0 and result["error"] < 0.01 for result in results)
    assert not list(time_all(compile_all(found, args, started), arguments(stop_s=0), started))


def test_the_fastest_right_way_is_written_and_others_entries_stay(tmp_path: Path) -> None:
    way = Config(block_out=64, block_in=64, split_in=1, block_rows=128, num_warps=4, num_stages=3)
    results = [
        {"case": Case("o", "int8", 64, way), "us": 9.0, "error": 1e-3},
        {"case": Case("o", "int8", 64, None), "us": 5.0, "error": 0.5},  # fast and wrong
        {"case": Case("o", "bfloat16", 64, way), "us": 9.0, "error": 1e-3},
        {"case": Case("o", "bfloat16", 64, None), "us": 8.0, "error": 1e-3},
    ]
    entries = table(results)
    [(key, entry)] = entries["linear_triton"].items()
    assert key == "in=4096,out=4096,rows=64,weight_bytes=1" and entry["us"] == 9.0
    assert Config(**entry["config"]) == way and not entries["linear_mosaic"]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"other": {"a": 1}, "linear_mosaic": {key: 1, "kept": 2}}))
    assert merged(path, entries, {key}) == {
        "other": {"a": 1},
        "linear_mosaic": {"kept": 2},
        "linear_triton": entries["linear_triton"],
    }
    assert describe(results[0]["case"]) != describe(results[1]["case"]) == "xla"


def test_products_are_judged_by_their_worst_shape_and_by_the_way_of_the_engine() -> None:
    def entry(shape: str, way: str, us: float) -> dict[str, Any]:
        sizes = {"floor_us": 8.0, "limit_us": 12.0, "dtype": "bfloat16", "rows": 64}
        return {"shape": shape, "way": way, "us": us, **sizes}

    entries = [entry("o", "m1*32", 11.0), entry("o", "xla", 15.0), entry("down", "xla", 13.0)]
    [judged] = kernels_linear.targets(entries)
    assert "1 of 2 shapes in their limits, worst down" in str(judged)
    assert judged["met"] is False
