"""A real engine on CPU is recorded, a model fitted to it, and another run predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import record_runs
from bench.simulator.fitting import fit
from bench.simulator.run_file import read_run
from bench.simulator.validation import compare


def test_runs_of_a_tiny_engine_are_recorded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--run", "fit-s2", "S2", "4", "40", "1", "--run", "check-s1", "S1", "3", "20", "1"]
    arguments = ["--geometry", "tiny", "--max-num-seqs", "4", "--max-num-batched-tokens", "32",
                 "--input", "4", "40", "--output", "2", "20", "--out", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["record_runs", *runs, *arguments])
    record_runs.main()
    assert "fit-s2" in capsys.readouterr().out
    first, second = (read_run(tmp_path / f"{name}.jsonl") for name in ("fit-s2", "check-s1"))
    for run, num in ((first, 40), (second, 20)):
        assert len(run.outcomes) == num
        assert all(o.num_output_tokens == o.num_wanted_tokens for o in run.outcomes)
        moments = [s.started_s for s in run.steps]
        assert moments == sorted(moments)
        assert all(s.started_s <= s.enqueued_s <= s.asked_s <= s.read_s for s in run.steps)
        tokens = sum(o.num_prompt_tokens + o.num_output_tokens - 1 for o in run.outcomes)
        assert sum(s.features.num_tokens for s in run.steps) >= tokens
    # Each run begins with an empty pool: every adapter that is asked for is installed.
    for run in (first, second):
        asked = {o.adapter for o in run.outcomes}
        assert sum(s.features.num_installs for s in run.steps) >= len(asked)
    assert first.head["seed"] != second.head["seed"]
    found = compare(second, fit([first]))  # how far off it is says more about the machine
    assert found["predicted"]["requests_per_s"] > 0
    assert found["num_requests"] == 20
