"""Runs the paper's grid in shards, each in one process and under nine minutes.

    python -m bench.sweep list
    python -m bench.sweep run core-7b --out bench/results/nvidia-h200/sweeps
    python -m bench.sweep run core-7b retention-7b --out DIR    # together: one start, one base
    python -m bench.sweep run --quick --out DIR         # a minute on a CPU
    python -m bench.sweep table bench/results/nvidia-h200/sweeps

A run writes one JSONL file for each engine that it starts, with a line for each point as it ends:
what was asked, what came of every request, counters and the ceiling. A point that is there is not
run again, so an interrupted run is resumed by the same command. `table` makes table.csv of all
files in a folder, wherever they were measured. Points that need the base's saturated rate get it
from the base on the same pool, which each file measures first; shards that are run together share
engines and bases.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from bench.point_run import run_point
from bench.points import EngineSpec, Point
from bench.records import RecordError, RecordFile, header, read_records, write_table
from bench.replay import ReplayError
from bench.shards import QUICK, SHARDS
from bench.sweep_bases import base_name, with_bases
from bench.sweep_engine import SweepEngine

TABLE = "table.csv"
NOT_IN_TABLE = ("requests", "key")


class ShardRun:
    """The points of one engine, into one file."""

    def __init__(self, spec: EngineSpec, points: Sequence[Point], path: Path) -> None:
        self.spec, self.path = spec, path
        self.points = with_bases(points)
        done: list[dict[str, Any]] = read_records(path)[1] if path.exists() else []
        self._done = {record["key"]: record for record in done}
        self.todo = [point for point in self.points if point.key not in self._done]

    def run(self, args: argparse.Namespace, deadline_s: float) -> int:
        """Run what is not there; the number of points that are left.

        Raises: RecordError: the file is another run's. ReplayError: the engine died.
        """
        if not self.todo:
            return 0
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            engine = SweepEngine(self.spec, Path(scratch), cache_dir=args.cache_dir)
            print(f"{self.spec.name}: ready in {engine.startup_s:.1f} s", flush=True)
            head = header(
                bench="sweep", device=engine.device, seed=self.points[0].seed,
                settings={"engine": dataclasses.asdict(self.spec)}, commit_name=args.commit,
            )  # fmt: skip
            head |= {"jax": jax.__version__, "startup_s": engine.startup_s}
            try:
                with RecordFile.resume(self.path, head) as file:
                    return self._run_points(engine, file, deadline_s)
            finally:
                engine.close()

    def _run_points(self, engine: SweepEngine, file: RecordFile, deadline_s: float) -> int:
        longest_s = 0.0
        for index, point in enumerate(tqdm(self.todo, unit="point", disable=None)):
            started = time.monotonic()
            if started + longest_s > deadline_s:
                return len(self.todo) - index
            with tqdm(total=1, unit="request", leave=False, disable=None) as bar:

                def show(num_ended: int, total: int, bar: Any = bar) -> None:
                    bar.total = total
                    bar.update(num_ended - bar.n)

                record = self._run_one(engine, point, show)
            record["seconds"] = time.monotonic() - started
            longest_s = max(longest_s, record["seconds"])
            file.append(record)
            self._done[point.key] = record
            tqdm.write(line(record))
        return 0

    def _run_one(self, engine: SweepEngine, point: Point, show: Any) -> dict[str, Any]:
        try:
            return run_point(engine, point, self._base_rate(point), show)
        except ValueError as exc:  # such as a pool that the device does not have
            return {"key": point.key, "point": point.record(), "error": str(exc)}

    def _base_rate(self, point: Point) -> float | None:
        """The base's saturated requests/s on the point's pool, while it was saturated."""
        for base in self.points:
            record = self._done.get(base.key)
            if base.system == "base" and base_name(base) == base_name(point) and record:
                found = record.get("steady") or {}
                return found.get("requests_per_s")
        return None


def line(record: dict[str, Any]) -> str:
    """A record for people to read."""
    point = record["point"]
    name = f"{point['figure']:14} {point['system']:24} {point['setting']} n={point['num_adapters']}"
    summary = record.get("summary")
    if summary is None:
        return f"{name}  {record.get('error', 'nothing finished')}"
    ceiling = record["ceiling"]
    return (
        f"{name}  {point['pool']}  {summary['requests_per_s']:.2f} requests/s, "
        f"{summary['num_finished']} of {summary['num_requests']} in {summary['wall_s']:.1f} s, "
        f"ceiling {ceiling:.3f}, {record['counters']['adapter_installs']} installs"
    )


def by_engine(points: Iterable[Point]) -> dict[EngineSpec, list[Point]]:
    found: dict[EngineSpec, list[Point]] = {}
    for point in points:
        found.setdefault(point.engine, []).append(point)
    return found


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The records of every sweep file in a folder, each with its file's device and commit.

    Raises RecordError: a file cannot be read.
    """
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        head, records = read_records(path)
        if head["bench"] == "sweep":
            origin = {key: head.get(key) for key in ("device", "commit", "jax")}
            found += [record | origin | {"file": path.name} for record in records]
    return found


def write_tidy(folder: Path) -> int:
    """One row a point, of all files; the number of rows."""
    rows = [
        {name: value for name, value in record.items() if name not in NOT_IN_TABLE}
        for record in read_all(folder)
    ]
    write_table(folder / TABLE, rows)
    return len(rows)


def run(args: argparse.Namespace) -> int:
    """Every engine in a process of its own, so that each has the whole device; exit status."""
    name = "quick" if args.quick else "_".join(args.shards)
    points = QUICK if args.quick else [point for shard in args.shards for point in SHARDS[shard]]
    groups = [
        (spec, of_spec)
        for spec, of_spec in by_engine(points).items()
        if args.engine in (None, spec.name)
    ]
    if len(groups) > 1:
        return max(_run_in_child(args, spec) for spec, _ in groups)
    status = 0
    for spec, of_spec in groups:
        shard = ShardRun(spec, of_spec, args.out / f"{name}.{spec.name}.jsonl")
        left = shard.run(args, time.monotonic() + args.deadline)
        if left:
            print(f"{name}: {left} points are left; the same command goes on with them")
            status = 3
    write_tidy(args.out)
    return status


def _run_in_child(args: argparse.Namespace, spec: EngineSpec) -> int:
    command = [sys.executable, "-m", "bench.sweep", "run", *args.shards]
    command += ["--quick"] if args.quick else []
    command += ["--engine", spec.name, "--out", str(args.out), "--deadline", str(args.deadline)]
    for option, value in (
        ("--commit", args.commit), ("--cache-dir", args.cache_dir), ("--scratch", args.scratch),
    ):  # fmt: skip
        command += [option, value] if value else []
    return subprocess.run(command, check=False).returncode


def main() -> int:
    args = _parse()
    logging.basicConfig(level=logging.WARNING)
    if args.what == "list":
        for name, points in SHARDS.items():
            engines = ", ".join(spec.name for spec in by_engine(points))
            print(f"{name:18} {len(points):3} points on {engines}")
        return 0
    try:
        if args.what == "table":
            print(f"{write_tidy(args.folder)} rows in {args.folder / TABLE}")
            return 0
        return run(args)
    except (OSError, RecordError, ReplayError) as exc:
        raise SystemExit(f"bench.sweep: {exc}") from exc


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("list", help="the shards")
    table = commands.add_parser("table", help="make table.csv of the files in a folder")
    table.add_argument("folder", type=Path)
    add = (running := commands.add_parser("run", help="run shards")).add_argument
    add("shards", nargs="*", choices=[*SHARDS, []], metavar="SHARD", help=", ".join(SHARDS))
    add("--quick", action="store_true", help="a small model and few requests, on any device")
    add("--out", type=Path, required=True, help="a folder for the records")
    add("--engine", help="only the points on this engine")
    add("--deadline", type=float, default=520.0, help="seconds after which no point is started")
    add("--cache-dir", help="of compiled programs")
    add("--scratch", help="where engines' files are written for a while")
    add("--commit", help="where the tree is not a repository")
    args = parser.parse_args()
    if args.what == "run" and bool(args.shards) == args.quick:
        running.error("shards: allowed: names of shards, or --quick")
    return args


if __name__ == "__main__":
    sys.exit(main())
