"""Predicts recorded runs with a fitted model, and says how far off it is.

    python -m bench.simulator.validate --model model.json --runs runs/check-s1.jsonl \\
        --out bench/results/.../simulator.json

The runs must not be those that the model was fitted on. The result has an entry of the summary for
each run's throughput (within 5 %) and median first-token time (within 10 %).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.record import command, commit, record
from bench.records import RecordError
from bench.simulator.device_model import DeviceModel
from bench.simulator.run_file import read_run
from bench.simulator.validation import compare_nearby, table, targets


def main() -> None:
    args = _parse()
    try:
        model = DeviceModel.load(args.model)
        runs = [read_run(path) for path in args.runs]
        known = {run.name for run in runs} & set(model.origin.get("runs", ()))
        if known:
            raise ValueError(f"runs: the model was fitted on {sorted(known)}, allowed: others")
    except (OSError, ValueError, RecordError) as exc:
        raise SystemExit(f"bench.simulator.validate: {exc}") from exc
    compared = [compare_nearby(run, model) for run in runs]
    result = {
        "bench": "simulator",
        "device": " and ".join(sorted({run.head["device"] for run in runs})),
        "commit": args.commit or commit(),
        "command": command(),
        "fitted_on": model.origin.get("runs"),
        "compared": compared,
        "targets": targets(compared),
    }
    record(result, args.out)
    print(table(compared))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--commit", help="of this tree, where it is no repository")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
