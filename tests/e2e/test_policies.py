"""Early abort, prefetch and retention around the real model: what is answered is answered right."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints.demo import ADAPTERS_DIR, MODEL_DIR
from checkpoints.demo.tasks import TASKS, prompt
from sloraj.engine import Engine
from sloraj.errors import FirstTokenTooLate
from sloraj.request import SamplingParams


@pytest.mark.parametrize(
    "settings",
    [
        {"early_abort": "model", "queue_order": "vtc", "cluster_adapters": 1},
        {"early_abort": "paper", "retention": "paper"},
    ],
    ids=str,
)
def test_a_crowd_is_answered_as_each_alone_or_told_to_come_back(settings: dict[str, str]) -> None:
    """300 requests at once, and half a second for the first token: there is not time for all."""
    names = ("shift-3", "reverse", "upper")
    tasks = [TASKS[name] for name in names] * 100
    with Engine(
        str(MODEL_DIR), max_num_seqs=2, max_num_batched_tokens=32, max_model_len=128,
        max_adapter_slots=2, first_token_slo_s=0.6, compilation_cache_dir="",
        adapters=tuple((name, str(Path(ADAPTERS_DIR) / name)) for name in names), **settings,
    ) as engine:  # fmt: skip
        answers = engine.generate(
            [prompt("hello world")] * len(tasks),
            SamplingParams(max_tokens=40, temperature=0),
            adapter=[task.id for task in tasks],
            return_errors=True,
        )
        stats = engine.stats()
    refused = [answer for answer in answers if answer.error is not None]
    assert 10 < len(refused) < len(answers)
    assert all(type(answer.error) is FirstTokenTooLate for answer in refused)
    assert all(1 <= answer.error.retry_after_s <= 60 for answer in refused)
    for task, answer in zip(tasks, answers, strict=True):
        assert answer.error is not None or answer.text == task.answer("hello world")
    counts = stats["first_token_slo"]
    assert counts["requests"] == len(tasks) and counts["aborted"] == len(refused)
    assert stats["num_requests"] == stats["num_leases"] == stats["num_waiting"] == 0
    assert stats["num_pages_free"] + stats["num_pages_adapters"] == stats["num_pages"]
    assert stats["step"]["learnt"] > 0 and stats["step"]["mean_s"] > 0
