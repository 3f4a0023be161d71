"""The cold first token: every pair is one cold and one warm request, and bytes cross once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import first_token


def test_every_adapter_is_cold_once_and_its_bytes_cross_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "first-token.json"
    words = ["--geometry", "tiny", "--ranks", "8", "--prompts", "24,40", "--adapters", "3",
             "--pool-bytes", str(64 << 20), "--cache-dir", "", "--out", str(out)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["first_token", *words])
    monkeypatch.setattr(first_token, "MIN_PROMPT", 40)
    first_token.main()
    result = json.loads(out.read_text())
    assert [(case["prompt"], case["adapters"]) for case in result["cases"]] == [(24, 3), (40, 3)]
    assert all(case["sent_over_held"] == 1 for case in result["cases"])
    assert all(case["cold_ms"] > 0 and case["warm_ms"] > 0 for case in result["cases"])
    in_bytes, later, in_bytes_too = result["targets"]  # the short one: by its bytes alone
    assert in_bytes["met"] and in_bytes_too["met"]
    assert later["met"] == (result["cases"][1]["penalty"] <= first_token.MAX_PENALTY[8])
    assert result["compiles_after_ready"] == 0


def test_only_long_prompts_are_judged_and_by_their_rank() -> None:
    case = {"rank": 64, "prompt": 512, "penalty": 0.3, "sent_over_held": 1.0}
    assert [entry["met"] for entry in first_token.targets([case])] == [True, True]
    case |= {"rank": 8, "sent_over_held": 2.0}
    assert [entry["met"] for entry in first_token.targets([case])] == [False, False]
