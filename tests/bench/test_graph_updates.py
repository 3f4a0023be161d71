"""XLA's log of CUDA graphs is counted by program, and what is not its log goes through."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.graph_updates import count

HEAD = "I1201 18:37:17.123456    4242 command_buffer_thunk.cc:300] "
BEGUN = (
    HEAD
    + "Update command buffer on device #0 by recoding command buffer cmd sequence after {runs} "
    "executions since last update; num_commands={kernels}; updated_allocs=2\n"
)
ENDED = HEAD + "Updated command buffer in {us} μs; num_commands={kernels}\n"
RUN = HEAD + "Execute command buffer on device #0; num_executions=1\n"
LINES = [
    BEGUN.format(runs=40, kernels=369), ENDED.format(us=700, kernels=369), RUN,
    "ready in 60 s\n",
    BEGUN.format(runs=3, kernels=32), ENDED.format(us=60, kernels=32), RUN, RUN,
    BEGUN.format(runs=1, kernels=369), ENDED.format(us=900, kernels=369), RUN,
]  # fmt: skip
COUNTED = {
    "32": {"updates": 1, "runs": 3, "us": 60},
    "369": {"updates": 2, "runs": 41, "us": 1600},
}


def test_updates_are_counted_by_number_of_kernels() -> None:
    others: list[str] = []
    assert count(LINES, others.append) == COUNTED
    assert others == ["ready in 60 s\n"]


def test_a_command_runs_with_xlas_log_and_its_end_is_passed_on(tmp_path: Path) -> None:
    """What it prints stays; the log that it was asked for does not."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        "assert os.environ['TF_CPP_VMODULE'] == 'command_buffer_thunk=3'\n"
        f"sys.stderr.write({''.join(LINES)!r})\n"
        "print('its own result')\n"
        "sys.exit(3)\n"
    )
    out = tmp_path / "updates.json"
    words = [sys.executable, "-m", "bench.graph_updates", "--out", str(out), "--"]
    done = subprocess.run(
        [*words, sys.executable, str(script)], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2], timeout=60,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stderr == "ready in 60 s\n"
    assert done.stdout.startswith("its own result\n")
    assert json.loads(out.read_text())["graphs"] == COUNTED
