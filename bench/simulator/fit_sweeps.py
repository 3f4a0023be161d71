"""Fits a model of the device to some points of sweeps, and predicts all the others.

    python -m bench.simulator.fit_sweeps --sweeps bench/results/nvidia-h200/sweeps \\
        --fit "base S2 n=0 full" "sloraj S2 n=200 full" "base S2 n=0 24 GB" \\
        --steps bench/results/nvidia-h200/step-7b.json \\
        bench/results/nvidia-h200/step-7b-small.json \\
        --host bench/results/nvidia-h200/offline-1000.json \\
        --first-token bench/results/nvidia-h200/first-token.json \\
        --out bench/results/nvidia-h200/simulator-model.json

Points to fit on are named as the printed table names them, of the first file that has them; all
their requests must have come at once. Results of `bench.step` show the steps that such a run lacks.
The host's part comes from a result of `bench.offline`, which times its verbs, and from one of
`bench.first_token`: what an idle engine takes besides the step. Every other point of the model's
geometry that a simulator can do is predicted, and becomes entries of the summary: throughput
(within 5 %) and median first token (within 10 %).
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
from bench.simulator.step_results import idle_host_s, step_intervals
from bench.simulator.sweep_runs import fit_intervals, intervals, read_runs
from bench.simulator.validation import compare_nearby, table, targets

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


def fit(
    runs: list[RecordedRun],
    steps: list[dict[str, Any]],
    host: dict[str, Any],
    first_token: dict[str, Any],
) -> DeviceModel:
    """steps, host, first_token: results of `bench.step`, `bench.offline`, `bench.first_token`.

    Raises ValueError if a run cannot be scheduled again, or if they are of different geometries.
    """
    engine = runs[0].engine
    singles = [one for result in steps for one in step_intervals(result, engine)]
    cost, errors = fit_intervals([*singles, *(one for run in runs for one in intervals(run))])
    execute, between = host_costs(host, idle_host_s(first_token, cost, engine))
    return DeviceModel(
        device=cost, execute=execute, between=between,
        bus_bytes_per_s=BUS_BYTES_PER_S, bus_latency_s=BUS_LATENCY_S,
        origin={
            "geometry": runs[0].engine.geometry, "device": runs[0].head["device"],
            "commit": runs[0].head["commit"], "command": command(),
            "runs": [run.name for run in runs], "errors": {"device": errors},
        },
    )  # fmt: skip


def host_costs(result: dict[str, Any], idle_s: float) -> tuple[Cost, Cost]:
    """`execute` and `between`, of a result of `bench.offline` and of the seconds that an idle
    engine takes for both.

    The offline run says what lies between two steps, what adapters add, and what an install takes
    (of the mode that reads adapters from disk). Its own mean of `execute` is of no use: it holds
    the time that the call waited for room in the device's queue behind large steps.
    """
    base, warm, disk = result["base"], result["warm"], result["disk"]
    between_s = sum(warm["verbs_s"][verb] for verb in OTHER_VERBS) / warm["steps"]

    def execute_s(mode: dict[str, Any]) -> float:
        verbs = mode["verbs_s"]
        return float(verbs["pack_step"] + verbs["reset"]) / float(mode["steps"])

    adds_s = max(execute_s(warm) - execute_s(base), 0.0)
    execute = {
        "step": max(idle_s - between_s, 0.0), "decode:attention": adds_s, "mixed:attention": adds_s,
        "num_installs": disk["verbs_s"]["install"] / disk["adapter_installs"],
    }  # fmt: skip
    return Cost(execute), Cost({"step": between_s})


def main() -> None:
    args = _parse()
    try:
        runs = [run for path in sorted(args.sweeps.glob("*.jsonl")) for run in read_runs(path)]
        fitted = chosen(runs, args.fit)
        steps = [_read(path) for path in args.steps]
        model = fit(fitted, steps, _read(args.host), _read(args.first_token))
    except (OSError, ValueError, RecordError) as exc:
        raise SystemExit(f"bench.simulator.fit_sweeps: {exc}") from exc
    known, geometry = {run.name for run in fitted}, fitted[0].engine.geometry
    compared = [
        compare_nearby(run, model)
        for run in runs
        if run.name not in known and run.engine.geometry == geometry
    ]
    model.origin["compared"] = compared
    model.origin["targets"] = targets(compared)
    model.save(args.out)
    print(json.dumps(model.origin["errors"], indent=1))
    print(table(compared))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sweeps", type=Path, required=True, help="a folder of bench.sweep")
    parser.add_argument("--fit", nargs="+", required=True, metavar="NAME", help="points to fit on")
    parser.add_argument("--steps", nargs="*", type=Path, default=[], help="results of bench.step")
    parser.add_argument("--host", type=Path, required=True, help="a result of bench.offline")
    parser.add_argument("--first-token", type=Path, required=True, help="of bench.first_token")
    parser.add_argument("--out", type=Path, required=True, help="the model, JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
