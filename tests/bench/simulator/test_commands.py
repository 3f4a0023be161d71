"""The commands that docstrings and docs/simulator.md give are ones that the programs take."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bench.simulator.validation import THROUGHPUT_ERROR

ROOT = Path(__file__).parents[3]
MODULES = (
    "bench.record_runs", "bench.simulator.fit", "bench.simulator.validate",
    "bench.simulator.fit_sweeps", "bench.simulator.fleet", "bench.simulator.beyond",
)  # fmt: skip


def commands(text: str) -> list[list[str]]:
    """Calls of this package's programs, in indented blocks and in fenced ones."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^(?: {4})?python -m (bench\..+)$", joined, re.MULTILINE)
    return [shlex.split(words) for words in found]


def test_the_page_gives_a_command_of_every_program() -> None:
    page = (ROOT / "docs" / "simulator.md").read_text()
    assert set(MODULES) - {"bench.record_runs"} <= {words[0] for words in commands(page)}
    assert "bench/record_gpu_runs.sh full" in page and f"{THROUGHPUT_ERROR:.0%}" in page


@pytest.mark.parametrize("module", MODULES)
def test_every_documented_command_parses(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "simulator.md").read_text()
    own = commands(importlib.import_module(module).__doc__ or "")
    assert own
    for words in [*own, *commands(page)]:
        if words[0] == module:
            monkeypatch.setattr("sys.argv", words)
            importlib.import_module(module)._parse()


@pytest.mark.parametrize("what", ["full", "capped"])
def test_the_runs_for_a_gpu_are_ones_that_can_be_recorded(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = ROOT / "bench" / "record_gpu_runs.sh"
    given = subprocess.run(
        ["bash", str(script), what, str(tmp_path), "--seed", "7"], capture_output=True, text=True,
        check=True, env={"PYTHON": "echo", "PATH": "/usr/bin:/bin"},
    ).stdout.split()  # fmt: skip
    record_runs = importlib.import_module(given[1])
    monkeypatch.setattr("sys.argv", given[1:])
    args = record_runs._parse()
    runs = [record_runs._run_of(words, args, args.seed) for words in args.run]
    assert len(runs) == {"full": 6, "capped": 2}[what]
    assert all(name.startswith(("fit-", "check-")) for name, _, _ in runs)
    assert sum(workload.duration_s for _, _, workload in runs) < 40
