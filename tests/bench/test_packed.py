"""The packed baseline: a model an adapter, each in its own queue, and no more than fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.baselines import packed
from bench.geometries import write_geometry
from bench.records import read_records
from bench.report_rows import rows_of
from checkpoints.hf_config import read_model_config


def _run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["packed", "--out", str(out), *words])
    packed.main()
    _, (record,) = read_records(out)
    return record


def test_as_many_models_fit_as_the_paper_could_pack(tmp_path: Path) -> None:
    """Table 3: 5 of 7B and 2 of 13B on 80 GB; the next size it tried was out of memory."""
    for geometry, fits, not_any_more in (("llama-7b", 5, 6), ("llama-13b", 2, 3)):
        config = read_model_config(write_geometry(geometry, tmp_path / geometry))
        assert packed.pool_share(config, fits, 80.0) > 1e9
        assert packed.pool_share(config, not_any_more, 80.0) <= 0


def test_models_beyond_the_memory_are_refused_before_any_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _run(monkeypatch, tmp_path / "x.jsonl", "--models", "100")
    assert record["summary"] is None and "out of memory: 100 models" in record["error"]
    (row,) = rows_of([record])
    assert not row.is_measured
    assert "out of memory" in capsys.readouterr().out


def test_each_request_is_served_by_its_adapters_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _run(
        monkeypatch, tmp_path / "x.jsonl", "--geometry", "tiny", "--models", "2", "--pool-bytes",
        "20000000", "--requests", "10", "--lengths", "4", "16", "--max-num-seqs", "4",
        "--max-num-batched-tokens", "32",
    )  # fmt: skip
    assert record["summary"]["num_finished"] == 10
    assert record["requests"]["num_output_tokens"] == record["requests"]["num_wanted_tokens"]
    assert set(record["requests"]["adapter"]) == {0, 1}
    assert record["counters"]["adapter_installs"] == 0  # they are in the weights
    assert record["counters"]["finished_requests"] == 10
