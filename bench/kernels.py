"""Every kernel against its floor, on the default device: LoRA, attention, linear layers.

    python -m bench.kernels --out-dir bench/results/nvidia-h200

Runs `bench.kernels_lora`, `bench.kernels_attention` and `bench.kernels_linear` one after another,
each in a process of its own, and leaves one result of each in the directory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

KINDS = ("lora", "attention", "linear")


def main() -> None:
    args = _parse()
    for kind in args.only or KINDS:
        out = args.out_dir / f"kernels-{kind}.json"
        command = [sys.executable, "-m", f"bench.kernels_{kind}", "--out", str(out)]
        if args.commit:
            command += ["--commit", args.commit]
        subprocess.run(command, check=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-dir", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=KINDS)
    parser.add_argument("--commit", help="where the tree is not a repository")
    return parser.parse_args()


if __name__ == "__main__":
    main()
