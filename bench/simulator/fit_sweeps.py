"""Fits a model of the device to some points of sweeps, and predicts all the others.

    python -m bench.simulator.fit_sweeps --sweeps bench/results/nvidia-h200/sweeps \\
        --fit "base S2 n=0 full" "sloraj S2 n=200 full" "base S2 n=0 24 GB" \\
        --host bench/results/nvidia-h200/offline-1000.json \\
        --out bench/results/nvidia-h200/simulator-model.json

Points to fit on are named as the printed table names them, of the first file that has them; all
their requests must have come at once. The host's part comes from a result of `bench.offline`, which
times it. Every other point that a simulator can do is predicted, and becomes entries of the
summary: throughput (within 5 %) and median first token (within 10 %).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.record import command
from bench.records import RecordError
from bench.simulator.cost import Cost
from bench.simulator.device_model import DeviceModel
from bench.simulator.fitting import BUS_BYTES_PER_S, BUS_LATENCY_S
from bench.simulator.run_file import RecordedRun
from bench.simulator.sweep_runs import fit_intervals, intervals, read_runs
from bench.simulator.validation import compare, table, targets

OTHER_VERBS = ("messages", "schedule", "update", "emit")


def chosen(runs: list[RecordedRun], names: list[str]) -> list[RecordedRun]:
    """Of each name the first run. Raises ValueError if there is none."""
    found = []
    for name in names:
        run = next((run for run in runs if run.name.partition(": ")[2] == name), None)
        if run is None:
            known = sorted({run.name.partition(": ")[2] for run in runs})
            raise ValueError(f"fit: got {name!r}, allowed: {', '.join(known)}")
        found.append(run)
    return found


def fit(runs: list[RecordedRun], host: dict[str, Any]) -> DeviceModel:
    """host: a result of `bench.offline`. Raises ValueError if a run cannot be scheduled again."""
    cost, errors = fit_intervals([one for run in runs for one in intervals(run)])
    execute, between = host_costs(host)
    # No run shows what a step waits for a copy that was not sent ahead: the bus says it.
    late = {"late_bytes": 1 / BUS_BYTES_PER_S}
    return DeviceModel(
        device=Cost(cost.coefficients | late), execute=execute, between=between,
        bus_bytes_per_s=BUS_BYTES_PER_S, bus_latency_s=BUS_LATENCY_S,
        origin={
            "geometry": runs[0].engine.geometry, "device": runs[0].head["device"],
            "commit": runs[0].head["commit"], "command": command(),
            "runs": [run.name for run in runs], "errors": {"device": errors},
        },
    )  # fmt: skip


def host_costs(result: dict[str, Any]) -> tuple[Cost, Cost]:
    """`execute` and `between` of a result of `bench.offline`: means a step, what adapters add, what
    an install takes (of the mode that reads adapters from disk).

    A mean of `execute` holds the time that it waited for the device's queue behind large steps. The
    host cannot take longer than the shortest steps took.
    """
    base, warm, disk = result["base"], result["warm"], result["disk"]
    between_s = sum(warm["verbs_s"][verb] for verb in OTHER_VERBS) / warm["steps"]

    def execute_s(mode: dict[str, Any]) -> float:
        verbs = mode["verbs_s"]
        mean_s = (verbs["execute"] - verbs.get("install", 0.0)) / mode["steps"]
        shortest_s = 1e-3 * min(b["median_ms"] for b in mode["buckets"].values() if b["steps"] > 1)
        return float(min(mean_s, shortest_s - between_s))

    adds_s = max(execute_s(warm) - execute_s(base), 0.0)
    execute = {
        "step": execute_s(base), "decode:attention": adds_s, "mixed:attention": adds_s,
        "num_installs": disk["verbs_s"]["install"] / disk["adapter_installs"],
    }  # fmt: skip
    return Cost(execute), Cost({"step": between_s})


def main() -> None:
    args = _parse()
    try:
        runs = [run for path in sorted(args.sweeps.glob("*.jsonl")) for run in read_runs(path)]
        fitted = chosen(runs, args.fit)
        model = fit(fitted, json.loads(args.host.read_text()))
    except (OSError, ValueError, RecordError) as exc:
        raise SystemExit(f"bench.simulator.fit_sweeps: {exc}") from exc
    known = {run.name for run in fitted}
    compared = [compare(run, model) for run in runs if run.name not in known]
    model.origin["compared"] = compared
    model.origin["targets"] = targets(compared)
    model.save(args.out)
    print(json.dumps(model.origin["errors"], indent=1))
    print(table(compared))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sweeps", type=Path, required=True, help="a folder of bench.sweep")
    parser.add_argument("--fit", nargs="+", required=True, metavar="NAME", help="points to fit on")
    parser.add_argument("--host", type=Path, required=True, help="a result of bench.offline")
    parser.add_argument("--out", type=Path, required=True, help="the model, JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
