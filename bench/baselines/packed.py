"""One merged model for each adapter, side by side on one device, as the paper ran vLLM ("packed").

    python -m bench.baselines.packed --geometry llama-7b --setting S1 --models 5 --total-gb 80 \\
        --requests 256 --out bench/results/nvidia-h200/sweeps/packed-S1-5.jsonl

Every model is an engine of its own with the adapter added into its weights, an equal share of what
the weights leave of the memory, and a queue of its own; the engines take turns on the device, a
step each while they have work. Models that do not fit into the memory are refused before anything
is loaded, and the record says so: out of memory. Where they fit, the requests are those of the
sweeps' point with as many adapters.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.clock import MonotonicClock
from bench.columns import to_columns
from bench.geometries import GEOMETRIES, write_geometry
from bench.measures import measures, point_trace
from bench.point_setup import WORKSPACE_BYTES
from bench.points import EngineSpec, Point
from bench.records import RecordError, RecordFile, header
from bench.replay import Replay
from bench.settings import SETTINGS
from bench.simulator.geometry import weight_bytes
from bench.sweep_engine import SweepEngine
from bench.trace import digest
from checkpoints.hf_config import read_model_config
from checkpoints.model_config import ModelConfig
from sloraj.core import EngineCore
from sloraj.messages import Abort, FromEngine, Generate, ToEngine


class PackedCores:
    """Engines that answer as one: adapter i is the i-th of them, which serves it as its base."""

    def __init__(self, cores: Sequence[EngineCore]) -> None:
        self._cores = list(cores)

    @property
    def is_idle(self) -> bool:
        return all(core.is_idle for core in self._cores)

    def submit(self, message: ToEngine) -> None:
        """A request to its adapter's engine; an abort to all of them."""
        if isinstance(message, Generate):
            number = int((message.adapter_id or "").rpartition("-")[2])
            self._cores[number].submit(
                Generate(
                    request_id=message.request_id, params=message.params,
                    prompt_token_ids=message.prompt_token_ids,
                )
            )  # fmt: skip
        elif isinstance(message, Abort):
            for core in self._cores:
                core.submit(message)
        else:
            raise TypeError(f"got {type(message).__name__}, allowed: Generate, Abort")

    def step(self) -> list[FromEngine]:
        return [m for core in self._cores if not core.is_idle for m in core.step()]

    def stats(self) -> dict[str, Any]:
        """The sums of the engines' own."""
        found: dict[str, Any] = {"runner": {}}
        for stats in (core.stats() for core in self._cores):
            for name, value in stats.items():
                if isinstance(value, int):
                    found[name] = found.get(name, 0) + value
        return found


def pool_share(config: ModelConfig, models: int, total_gb: float) -> int:
    """Bytes of each model's pool. Not positive: so many models do not fit."""
    left = int(total_gb * 1e9) - WORKSPACE_BYTES - models * weight_bytes(config)
    return left // models


def run(args: argparse.Namespace, point: Point, share: int) -> tuple[dict[str, Any], str]:
    """(what was measured, the device)."""
    trace = point_trace(point, None)
    setting = SETTINGS[args.setting]
    engines = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for i in range(args.models):
            folder = Path(scratch) / str(i)
            folder.mkdir()
            spec = dataclasses.replace(
                point.engine, merged_rank=setting.adapter_rank(i), pool_bytes=share
            )
            engines.append(SweepEngine(spec, folder, cache_dir=args.cache_dir))
        base = dataclasses.replace(point, num_adapters=0, pool_gb=None)
        cores = PackedCores([engine.core(base) for engine in engines])
        result = Replay(
            cores, trace, MonotonicClock(), vocab_size=engines[0].model.vocab_size,
            give_up_s=point.give_up_s,
        ).run()  # fmt: skip
        for engine in engines:
            engine.close()
    found = {
        "engine": {"kernels": engines[0].info["kernels"], "dtype": engines[0].info["dtype"]},
        "pool": {"bytes": share, "models": args.models},
        "trace_digest": digest(trace),
        **measures(result.outcomes, None),
        "counters": result.counters,
        "requests": to_columns(result.outcomes),
    }
    return found, engines[0].device


def main() -> None:
    args = _parse()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        config = read_model_config(write_geometry(args.geometry, Path(folder)))
    point = Point(
        figure="table-3", system="packed", setting=args.setting, num_adapters=args.models,
        pool_gb=args.total_gb, num_requests=args.requests, input_range=tuple(args.lengths),
        output_range=tuple(args.lengths),
        engine=EngineSpec(
            geometry=args.geometry, max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens, max_adapter_slots=1,
        ),
    )  # fmt: skip
    share = args.pool_bytes or pool_share(config, args.models, args.total_gb)
    found: dict[str, Any] = {
        "summary": None,
        "error": f"out of memory: {args.models} models of {weight_bytes(config) / 1e9:.1f} GB in "
        f"{args.total_gb:g} GB",
    }
    device = "none"
    if share > 0:
        found, device = run(args, point, share)
    head = header(
        bench="sweep", device=device, seed=point.seed, settings={"baseline": "packed"},
        commit_name=args.commit,
    )  # fmt: skip
    empty = {"key": point.key, "point": point.record(), "ceiling": None, "steps": {}}
    try:
        with RecordFile.create(args.out, head) as file:
            file.append(empty | found)
    except RecordError as exc:
        raise SystemExit(f"bench.baselines.packed: {exc}") from exc
    summary = found["summary"]
    print(f"{summary['requests_per_s']:.2f} requests/s" if summary else found.get("error"))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--geometry", choices=sorted(GEOMETRIES), default="llama-7b")
    add("--setting", choices=sorted(SETTINGS), default="S1")
    add("--models", type=int, default=5, help="adapters, each with a model of its own")
    add("--total-gb", type=float, default=80.0, help="device memory for all of them")
    add("--pool-bytes", type=int, help="of each, in place of its share")
    add("--requests", type=int, default=256)
    add("--lengths", type=int, nargs=2, default=[8, 512], help="of prompts and outputs, [from, to)")
    add("--max-num-seqs", type=int, default=64)
    add("--max-num-batched-tokens", type=int, default=1024)
    add("--cache-dir", help="of compiled programs")
    add("--scratch", help="where files are written for a while")
    add("--out", type=Path, required=True)
    add("--commit", help="where the tree is not a repository")
    return parser.parse_args()


if __name__ == "__main__":
    main()
