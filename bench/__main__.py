"""The paper's evaluation by one command: sweeps in shards, what is simulated, report, summary.

    python -m bench                        # every shard; hours on a GPU
    python -m bench core-7b retention-7b # some
    python -m bench --quick                # a minute or two on a CPU

Results go to bench/results/DEVICE/sweeps, the summary of all targets to bench/results/DEVICE. A
point that is there is not run again, so an interrupted run goes on by the same command.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.shards import SHARDS

RESULTS = Path(__file__).parent / "results"


def device_folder() -> str:
    """A name of this machine's first GPU, as a folder; "cpu" where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    name = found.stdout.splitlines()[0] if found.stdout.strip() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def steps(args: argparse.Namespace) -> list[list[str]]:
    """The commands that are run, in order, without the interpreter."""
    out = args.out or RESULTS / device_folder()
    sweeps = out / "sweeps"
    found = []
    for shard in ["--quick"] if args.quick else args.shards or [*SHARDS]:
        command = ["bench.sweep", "run", shard, "--out", str(sweeps)]
        found.append(command + (["--cache-dir", args.cache_dir] if args.cache_dir else []))
    model = out / "simulator-model.json"
    if model.exists():  # fitted on this device
        words = ["--model", str(model), "--out", str(out / "simulated-beyond.json")]
        found.append(["bench.simulator.beyond", *words])
    found.append(["bench.report", str(sweeps), "--targets", str(out / "sweeps.json")])
    found.append(["bench.summary", str(out)])
    return found


def main() -> int:
    """A shard that fails does not stop the others; the exit status says so."""
    status = 0
    for module, *words in steps(_parse()):
        print(f"--- python -m {module} {' '.join(words)}", flush=True)
        done = subprocess.run([sys.executable, "-m", module, *words], check=False)
        status = max(status, abs(done.returncode))
    return status


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("shards", nargs="*", metavar="SHARD", help=", ".join(SHARDS))
    add("--quick", action="store_true", help="a small model, on any device")
    add("--out", type=Path, help="a folder; bench/results/DEVICE")
    add("--cache-dir", help="of compiled programs")
    args = parser.parse_args()
    unknown = [name for name in args.shards if name not in SHARDS]
    if unknown:
        parser.error(f"SHARD: got {unknown[0]!r}, allowed: {', '.join(SHARDS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
