"""The client against this project's own server: the real HTTP stack over a fake engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import serving
from bench.outcome import Outcome
from bench.records import read_records
from bench.trace import Request, default_tenant
from bench.trace_files import write_trace

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 259  # of the fake engine


@pytest.fixture
def url() -> Iterator[str]:
    """A server process whose engine makes a token every 2 ms; it has no adapters."""
    script = ROOT / "tests" / "serving" / "serve_fake.py"
    with subprocess.Popen(
        [sys.executable, str(script), "0.002", "5", "0"], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        found = re.match(r"ready: (http://\S+) serves", process.stdout.readline())
        assert found
        yield found[1]
        process.terminate()
        process.communicate(timeout=20)


def test_every_token_of_our_server_is_seen_and_an_unknown_adapter_is_its_error(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = [
        Request(
            arrival_s=index * 0.005, adapter=0 if index % 4 == 3 else None,
            tenant=default_tenant(0 if index % 4 == 3 else None), num_prompt_tokens=10 + index,
            num_output_tokens=20 + index,
        )
        for index in range(40)
    ]  # fmt: skip
    write_trace(tmp_path / "trace.jsonl", trace, {})
    words = [
        "--url", url, "--trace", str(tmp_path / "trace.jsonl"), "--out", str(tmp_path / "o.jsonl"),
        "--vocab-size", str(VOCAB_SIZE), "--model-template", "none-{i}", "--keep-moments",
        "--quiet", "--commit", "abc",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench.serving", *words])
    assert serving.main() == 0
    head, records = read_records(tmp_path / "o.jsonl")
    assert head["settings"]["base_model"] == "fake-base"
    outcomes = {record["index"]: Outcome.from_record(record) for record in records}
    assert sorted(outcomes) == list(range(40))
    for index, request in enumerate(trace):
        outcome = outcomes[index]
        if request.adapter is not None:
            assert outcome.status == 404 and outcome.error is not None
            assert "none-0" in outcome.error
            continue
        assert outcome.error is None
        assert outcome.num_output_tokens == request.num_output_tokens
        assert outcome.finish_reason == "length"
        assert outcome.token_s is not None and len(outcome.token_s) > request.num_output_tokens / 2
    assert "30 of 40 finished; failed: 10 http" in capsys.readouterr().out
