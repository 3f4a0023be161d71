"""The PEFT baseline serves a whole trace, one adapter a batch; needs torch, transformers, peft."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from bench.records import read_records
from bench.report_rows import rows_of

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]


@pytest.fixture
def baseline() -> Any:
    pytest.importorskip("peft")
    return importlib.import_module("bench.baselines.peft_switching")


def test_every_request_gets_its_tokens_in_batches_of_one_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: Any
) -> None:
    batches = []
    inner = baseline.PeftServer.batch

    def noted(self: Any, adapter: int, prompts: list[list[int]], *rest: Any) -> Any:
        batches.append((adapter, len(prompts)))
        return inner(self, adapter, prompts, *rest)

    monkeypatch.setattr(baseline.PeftServer, "batch", noted)
    out = tmp_path / "peft.jsonl"
    monkeypatch.setattr(
        "sys.argv",
        ["peft_switching", "--geometry", "tiny", "--setting", "S2", "--adapters", "3",
         "--requests", "12", "--lengths", "4", "16", "--max-batch", "4", "--out", str(out)],
    )  # fmt: skip
    baseline.main()
    _, (record,) = read_records(out)
    assert record["summary"]["num_finished"] == 12
    assert record["requests"]["num_output_tokens"] == record["requests"]["num_wanted_tokens"]
    assert sum(size for _, size in batches[1:]) == 12
    assert {adapter for adapter, _ in batches} == {0, 1, 2}
    assert max(size for _, size in batches) <= 4
    (row,) = rows_of([record])
    assert row.system == "PEFT" and row.requests_per_s > 0


def test_weights_of_adapters_differ_and_change_the_answer(baseline: Any) -> None:
    torch = pytest.importorskip("torch")
    server = baseline.PeftServer("tiny", [8, 64], "cpu")
    found = {n: p for n, p in server.model.named_parameters() if "layers.0" in n and "lora_B" in n}
    assert all(p.abs().max() > 0 for p in found.values())
    ids = torch.tensor([[5, 6, 7]])
    logits = []
    for adapter in ("0", "1"):
        server.model.set_adapter(adapter)
        logits.append(server.model(input_ids=ids).logits)
    assert not torch.equal(*logits)
