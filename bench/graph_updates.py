"""How often XLA records its CUDA graphs again because an array has moved, and what that takes.

    python -m bench.graph_updates -- python -m bench.idle --geometry llama-7b --rows 64 --out i.json
    XLA_FLAGS=--xla_gpu_temp_buffer_use_separate_color=true python -m bench.graph_updates -- ...

A graph holds the addresses of its arrays. Before it is launched with others, the host records the
kernels that use them again: most of them, where it is the program's scratch memory that has moved.
XLA logs that; here a command is run with that log, and its lines are counted by program. Programs
are told apart by their number of kernels alone. What else the command prints goes through.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.record import command, commit, record

LOGGED = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "command_buffer_thunk=3"}
BEGUN = re.compile(
    r"Update command buffer .* after (?P<runs>\d+) executions since last update"
    r"; num_commands=(?P<kernels>\d+)"
)
ENDED = re.compile(r"Updated .*in (?P<us>\d+) \S+; num_commands=(?P<kernels>\d+)")
LOG_LINE = re.compile(r"^[IW]\d{4} ")  # of XLA; errors go through


def count(lines: Iterable[str], forward: Callable[[str], object]) -> dict[str, dict[str, int]]:
    """By number of kernels: times recorded again, runs up to the last of them, microseconds that
    recording took. Lines that are not XLA's are forwarded.
    """
    found: dict[str, dict[str, int]] = collections.defaultdict(
        lambda: {"updates": 0, "runs": 0, "us": 0}
    )
    for line in lines:
        if begun := BEGUN.search(line):
            found[begun["kernels"]]["updates"] += 1
            found[begun["kernels"]]["runs"] += int(begun["runs"])
        elif ended := ENDED.search(line):
            found[ended["kernels"]]["us"] += int(ended["us"])
        elif not LOG_LINE.match(line):
            forward(line)
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def main() -> None:
    args = _parse()
    environment = os.environ | LOGGED
    with subprocess.Popen(args.run, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = count(process.stderr, sys.stderr.write)
    result = {"bench": "graph-updates", "commit": commit(), "command": command(), "graphs": found}
    record(result | {"xla_flags": os.environ.get("XLA_FLAGS", "")}, args.out)
    sys.exit(process.returncode)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the counts, JSON")
    parser.add_argument("run", nargs="+", metavar="COMMAND", help="after --")
    return parser.parse_args()


if __name__ == "__main__":
    main()
