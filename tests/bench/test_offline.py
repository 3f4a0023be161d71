"""The offline benchmark runs whole on CPU, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import offline


def test_a_tiny_run_serves_every_request_and_compiles_nothing_after_readiness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    arguments = {
        "geometry": "tiny", "adapters": 6, "ranks": "64,8", "requests": 8, "input": 24,
        "output": 6, "max-num-seqs": 4, "max-num-batched-tokens": 32, "pool-bytes": 3_000_000,
        "modes": "base,cold,warm,disk,engine", "out": out,
    }  # fmt: skip
    argv = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["offline", *argv])
    offline.main()
    capsys.readouterr()
    result = json.loads(out.read_text())
    for run in (result[mode] for mode in ("base", "cold", "warm", "disk")):
        assert run["num_output_tokens"] == 8 * 6
        assert run["num_prompt_tokens"] == 8 * 24
        assert run["compiles_after_ready"] == 0
        assert 0 < run["first_token_s"]["p50"] <= run["wall_s"]
    assert result["base"]["adapter_installs"] == 0
    assert result["cold"]["adapter_installs"] >= 6
    assert result["disk"]["adapter_installs"] >= 6
    assert result["through_engine"]["requests_per_s"] > 0
    assert result["engine"]["num_programs"] <= 24
    assert [entry["number"] for entry in result["targets"]] == ["10"]


@pytest.mark.parametrize(
    "modes", ["base,warm,cold", "warm", "base,engine,disk", "engine", "base,base", "base,hot", ""]
)
def test_modes_whose_figures_would_be_anothers_are_refused(
    modes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["offline", "--modes", modes])
    with pytest.raises(SystemExit):
        offline.main()
    assert f"--modes: got {modes!r}, allowed: base,cold,warm,disk,engine" in capsys.readouterr().err
