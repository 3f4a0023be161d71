"""The benchmarks of the host's side run on CPU, through the code that they measure on a device."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench import host, idle, transfers


def run(
    module: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any
) -> dict[str, Any]:
    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value)) if word]
    monkeypatch.setattr("sys.argv", [module.__name__, *words, "--out", str(out)])
    module.main()
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_every_verb_of_a_step_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(host, tmp_path / "host.json", monkeypatch, rows=4, steps=8, layers=2)
    for name in ("decode-4", "churn-4"):
        verbs = result[name]
        parts = sum(verbs[verb] for verb in ("schedule", "execute", "collect", "update"))
        assert 0 < verbs["pack_step"] <= verbs["forward"] <= verbs["execute"] < parts
        assert verbs["step"] > 0


def test_installs_ride_with_real_decode_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "NUM_STEPS", 6)
    sizes = {"rows": 4, "context": 24, "max-num-batched-tokens": 32, "pool-bytes": 8_000_000}
    result = run(idle, tmp_path / "idle.json", monkeypatch, geometry="tiny", installs="", **sizes)
    assert result["compiles_after_ready"] == 0
    assert result["rows"][0]["engine_ms"] > 0 and result["rows"][0]["raw_ms"] > 0
    assert result["installs"]["num_installed"] > 10
    assert [entry["number"] for entry in result["targets"]] == ["11"]


def test_transfers_are_measured_in_every_kind_of_memory_that_the_platform_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(transfers, tmp_path / "transfers.json", monkeypatch, geometry="tiny", pages="1,2")
    measured = [(row["pages"], row["kind"]) for row in result["rows"] if "error" not in row]
    assert {(pages, kind) for pages in (1, 2) for kind in ("numpy", "pinned_host")} <= set(measured)
    assert all(row["one_gb_s"] > 0 for row in result["rows"] if "error" not in row)
