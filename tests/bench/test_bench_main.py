"""`python -m bench` runs what it says: the sweeps, then the report, then the summary."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from bench.shards import SHARDS

main = importlib.import_module("bench.__main__")


def _steps(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[list[str]]:
    monkeypatch.setattr("sys.argv", ["bench", "--out", "OUT", *words])
    found: list[list[str]] = main.steps(main._parse())
    return found


def test_all_shards_are_run_in_order_of_value_then_reported_and_summed_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    *sweeps, report, summary = _steps(monkeypatch)
    assert [command[:3] for command in sweeps] == [["bench.sweep", "run", s] for s in SHARDS]
    assert report == ["bench.report", str(Path("OUT/sweeps")), "--targets", "OUT/sweeps.json"]
    assert summary == ["bench.summary", "OUT"]


def test_named_shards_alone_are_run_and_unknown_names_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [c[2] for c in _steps(monkeypatch, "rate", "cv")[:-2]] == ["rate", "cv"]
    assert _steps(monkeypatch, "--quick")[0][2] == "--quick"
    with pytest.raises(SystemExit):
        _steps(monkeypatch, "no-such")
    assert "SHARD: got 'no-such', allowed: core-7b" in capsys.readouterr().err


def test_a_shard_that_fails_leaves_the_rest_and_the_status_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    class Done:
        def __init__(self, command: list[str]) -> None:
            ran.append(command[2])
            self.returncode = 3 if "cv" in command else 0

    monkeypatch.setattr(main.subprocess, "run", lambda command, check: Done(command))
    monkeypatch.setattr("sys.argv", ["bench", "cv", "rate", "--out", "OUT"])
    assert main.main() == 3
    assert ran == ["bench.sweep", "bench.sweep", "bench.report", "bench.summary"]
    capsys.readouterr()
