"""Fits a model of device and host to recorded runs (`bench.record_runs`).

    python -m bench.simulator.fit --runs runs/fit-base.jsonl runs/fit-s2.jsonl --out model.json

Prints how far the model is from what it was fitted on; `bench.simulator.validate` says how far it
is from other runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.record import command
from bench.records import RecordError
from bench.simulator.fitting import fit
from bench.simulator.run_file import read_run


def main() -> None:
    args = _parse()
    try:
        model = fit([read_run(path) for path in args.runs])
    except (OSError, ValueError, RecordError) as exc:
        raise SystemExit(f"bench.simulator.fit: {exc}") from exc
    model.origin["command"] = command()
    model.save(args.out)
    print(json.dumps(model.origin["errors"], indent=1))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="recorded runs")
    parser.add_argument("--out", type=Path, required=True, help="the model, JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
