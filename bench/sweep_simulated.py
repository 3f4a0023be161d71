"""The points of the paper's grid that no machine here holds, as records of a sweep: SIMULATED.

    python -m bench.sweep_simulated --model bench/results/nvidia-h200/simulator-model.json \\
        --out bench/results/nvidia-h200/sweeps

Runs `bench.shards.SIMULATED` (or, under --shards, points that were measured too, into another
folder, to see how far off the simulator is) on simulated engines and writes files as `bench.sweep`
does, a line for each point with "simulated": true. A point that is there is not run again.
Other bases and several GPUs are what `bench.simulator.scaling` assumes of them.
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
from bench.points import EngineSpec, Point
from bench.records import RecordError, RecordFile, header
from bench.replay import Replay, ReplayError
from bench.settings import SETTINGS
from bench.shards import SHARDS, SIMULATED
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import EngineDescription, register, simulated_core
from bench.simulator.geometry import describe_geometry, device_pool_bytes, model_config
from bench.simulator.scaling import Link, scaled
from bench.sweep import base_name, by_engine, with_bases
from bench.sweep_engine import capped_pool_bytes, with_policies
from bench.trace import digest, rate
from sloraj.config import EngineConfig


def describe(point: Point) -> EngineDescription:
    """The point's engine. Raises ValueError: what this simulator has no model of."""
    spec = point.engine
    unknown = {
        "kernels": spec.kernels, "merged_rank": spec.merged_rank, "pad_ranks": point.pad_ranks,
        "pool_pages": point.pool_pages,
    }  # fmt: skip
    for name, value in unknown.items():
        if value:
            raise ValueError(f"{name}: got {value!r}, allowed: none, simulated")
    pool_bytes = device_pool_bytes(spec.geometry, spec.tensor_parallel_size)
    if point.pool_gb is not None:
        pool_bytes = capped_pool_bytes(model_config(spec.geometry), point.pool_gb)
    found = describe_geometry(
        spec.geometry, pool_bytes=pool_bytes, max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens, max_model_len=spec.max_model_len,
        max_rank=spec.max_rank, max_adapter_slots=spec.max_adapter_slots,
        tp=spec.tensor_parallel_size,
    )  # fmt: skip
    engine = EngineConfig(
        model="", max_num_seqs=spec.max_num_seqs, max_rank=spec.max_rank,
        max_num_batched_tokens=spec.max_num_batched_tokens,
    )  # fmt: skip
    scheduler = with_policies(found.scheduler, engine, dict(point.policies))
    if point.adapter_share is not None:
        share = int(point.adapter_share * (scheduler.num_pages - 1))
        scheduler = dataclasses.replace(scheduler, num_adapter_pages=share)
    return dataclasses.replace(found, scheduler=scheduler)


def run_point(point: Point, model: DeviceModel, base_rate: float | None) -> dict[str, Any]:
    """The record of a point, as `bench.point_run` makes it."""
    trace, engine, clock = point_trace(point, base_rate), describe(point), SimulatedClock()
    spec, source = point.engine, model.origin["geometry"]
    if spec.geometry != source or spec.tensor_parallel_size > 1:
        model = scaled(model, model_config(source), engine, Link())
    core = simulated_core(engine, model, clock)
    register(core, SETTINGS[point.setting].adapter_ranks(point.num_adapters))
    result = Replay(
        core, trace, clock, vocab_size=engine.scheduler.vocab_size, model=engine.model,
        prompt=lambda index, request: [0] * request.num_prompt_tokens, give_up_s=point.give_up_s,
    ).run()  # fmt: skip
    return {
        "key": point.key,
        "point": point.record(),
        "simulated": True,
        "pool": {"pages": engine.scheduler.num_pages},
        "trace_digest": digest(trace),
        "base_rate": base_rate,
        **measures(result.outcomes, None if point.is_saturated else rate(trace)),
        "ceiling": retention_ceiling(engine.model, result.work),
        "counters": result.counters,
        "steps": result.steps,
        "requests": to_columns(result.outcomes),
    }


def run_engine(
    spec: EngineSpec, points: Sequence[Point], model: DeviceModel, args: argparse.Namespace
) -> None:
    """The points of one engine, into one file. Raises RecordError: the file is another run's."""
    every = with_bases(points)
    head = header(
        bench="sweep", device=f"simulated {model.origin['device']}", seed=every[0].seed,
        settings={
            "engine": dataclasses.asdict(spec),
            "model": {key: model.origin.get(key) for key in ("device", "commit", "runs")},
        },
        commit_name=args.commit,
    )  # fmt: skip
    with RecordFile.resume(args.out / f"simulated.{spec.name}.jsonl", head) as file:
        done = {record["key"]: record for record in file.records}
        rates: dict[tuple[Any, ...], float | None] = {}
        for point in tqdm(every, desc=spec.name, unit="point", disable=None):
            record = done.get(point.key)
            if record is None:
                try:
                    record = run_point(point, model, rates.get(base_name(point)))
                except (ValueError, ReplayError) as exc:
                    record = {"key": point.key, "point": point.record(), "simulated": True,
                              "error": str(exc)}  # fmt: skip
                file.append(record)
            if point.figure == "base":
                rates[base_name(point)] = (record.get("steady") or {}).get("requests_per_s")
            summary = record.get("summary") or {}
            tqdm.write(f"{point.key}: {summary.get('requests_per_s', record.get('error'))}")


def main() -> None:
    args = _parse()
    points = [point for name in args.shards for point in SHARDS[name]] or SIMULATED
    try:
        model = DeviceModel.load(args.model)
        for spec, some in by_engine(points).items():
            run_engine(spec, some, model, args)
    except (OSError, ValueError, RecordError) as exc:
        raise SystemExit(f"bench.sweep_simulated: {exc}") from exc


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a fitted model")
    parser.add_argument(
        "--shards", nargs="*", choices=sorted(SHARDS), default=[],
        help="of bench.sweep; none: the points that can only be simulated",
    )  # fmt: skip
    parser.add_argument("--commit", help="of this tree, where it is no repository")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
