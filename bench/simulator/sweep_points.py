"""The grid of sweeps, SIMULATED: what its points should show before a device has shown it.

    python -m bench.simulator.sweep_points --model bench/results/nvidia-h200/simulator-model.json \\
        --out bench/results/nvidia-h200/simulated-sweeps
    python -m bench.report bench/results/nvidia-h200/simulated-sweeps

writes files as `bench.sweep` does, of the points of the model's geometry that a simulator can do,
each shard against bases that are simulated too. Their device is called SIMULATED, and no target is
judged by them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.ceiling import retention_ceiling
from bench.clock import SimulatedClock
from bench.columns import to_columns
from bench.measures import measures, point_trace
from bench.outcome import Outcome
from bench.point_setup import capped_pool_bytes
from bench.points import Point
from bench.records import RecordError, RecordFile, header
from bench.shards import SHARDS
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import EngineDescription, register, simulated_core
from bench.simulator.geometry import device_pool_bytes, page_bytes
from bench.simulator.run_file import RecordedRun
from bench.simulator.sweep_runs import adapter_ranks, can_simulate, point_engine, run_name
from bench.simulator.validation import replay
from bench.sweep_bases import base_name, with_bases
from bench.trace import digest, rate

SIMULATED = "SIMULATED"


def simulate(point: Point, model: DeviceModel, base_rate: float | None) -> dict[str, Any]:
    """The record of a point, as `bench.point_run` makes it of a device."""
    engine = _engine(point)
    trace = point_trace(point, base_rate)
    clock = SimulatedClock()
    core = simulated_core(engine, model, clock)
    register(core, adapter_ranks(point))
    run = RecordedRun(
        name=run_name(point), head={}, engine=engine, adapter_ranks=adapter_ranks(point), steps=[],
        outcomes=[Outcome.of(i, request) for i, request in enumerate(trace)], point=point,
    )  # fmt: skip
    result = replay(core, run, clock)
    pages = engine.scheduler.num_pages
    return {
        "key": point.key,
        "point": point.record(),
        "engine": {"max_rank": engine.scheduler.max_rank},
        "pool": {"pages": pages, "bytes": pages * page_bytes(engine.layout)},
        "trace_digest": digest(trace),
        "base_rate": base_rate,
        **measures(result.outcomes, None if point.is_saturated else rate(trace)),
        "ceiling": retention_ceiling(engine.model, result.work),
        "counters": result.counters,
        "steps": result.steps,
        "requests": to_columns(result.outcomes),
    }


def _engine(point: Point) -> EngineDescription:
    """On the pool of the point, or on all that an H200 has."""
    any_pool = point_engine(point, 2)
    size = page_bytes(any_pool.layout)
    if point.pool_gb is not None:
        return point_engine(point, capped_pool_bytes(any_pool.model, point.pool_gb) // size)
    return point_engine(point, int(device_pool_bytes(point.engine.geometry) // size))


def simulate_shard(
    points: Sequence[Point], model: DeviceModel, path: Path, commit_name: str | None = None
) -> int:
    """Write the records of a shard's points; how many. Raises RecordError: there is such a file."""
    mine = [p for p in points if can_simulate(p) and p.engine.geometry == model.origin["geometry"]]
    if not mine:
        return 0
    head = header(
        bench="sweep", device=f"{SIMULATED} {model.origin['device']}", seed=mine[0].seed,
        settings={"engine": dataclasses.asdict(mine[0].engine), "fitted_on": model.origin["runs"]},
        commit_name=commit_name,
    )  # fmt: skip
    rates: dict[tuple[Any, ...], float] = {}
    with RecordFile.create(path, head) as file:
        for point in tqdm(with_bases(mine), unit="point", disable=None):
            record = simulate(point, model, rates.get(base_name(point)))
            if point.figure == "base":
                rates[base_name(point)] = record["steady"]["requests_per_s"]
            file.append(record)
    return len(mine)


def main() -> None:
    args = _parse()
    model = DeviceModel.load(args.model)
    for name in args.shards or SHARDS:
        path = args.out / f"{name}.{model.origin['geometry']}.jsonl"
        try:
            print(f"{name}: {simulate_shard(SHARDS[name], model, path, args.commit)} points")
        except (OSError, RecordError) as exc:
            raise SystemExit(f"bench.simulator.sweep_points: {exc}") from exc


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", nargs="*", choices=[*SHARDS, []], metavar="SHARD")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--commit", help="of this tree, where it is no repository")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the records")
    return parser.parse_args()


if __name__ == "__main__":
    main()
