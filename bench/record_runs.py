"""Records real runs, step by step: what `bench.simulator` is fitted on, and validated against.

    python -m bench.record_runs --geometry llama-7b --max-num-seqs 256 \\
        --run fit-s1 S1 200 24 10 --run check-s2 S2 100 12 10 --out bench/results/.../runs

One engine makes all runs, one after another, each from an empty pool: NAME SETTING ADAPTERS RATE
SECONDS, with the ranks of a setting of the paper (`bench.settings`) and its generator
(`bench.workloads`): ADAPTERS 0 is the base model. Each run is a file NAME.jsonl in --out. Weights
and prompts are random.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

from bench.clock import MonotonicClock
from bench.geometries import GEOMETRIES, write_geometry
from bench.random_adapters import random_adapter_loader, random_path
from bench.records import header
from bench.replay import Replay
from bench.settings import SETTINGS
from bench.simulator.run_file import BENCH, run_settings, write_run
from bench.slo import summarise, table
from bench.step_trace import StepTrace, describe
from bench.workloads import Workload, generate
from sloraj.build import build_core
from sloraj.config import EngineConfig
from sloraj.core import EngineCore


def main() -> None:
    args = _parse()
    runs = [_run_of(words, args, args.seed + i) for i, words in enumerate(args.run)]
    with tempfile.TemporaryDirectory() as scratch:
        core, device = _build(args, runs, Path(scratch))
        for name, setting, workload in runs:
            _record(args, core, device, name, setting, workload)


def _run_of(words: list[str], args: argparse.Namespace, seed: int) -> tuple[str, str, Workload]:
    name, setting, adapters, rate, duration = words
    if setting not in SETTINGS:
        raise SystemExit(f"bench.record_runs: got {setting!r}, allowed: {', '.join(SETTINGS)}")
    workload = Workload(
        rate=float(rate), duration_s=float(duration), num_adapters=int(adapters),
        input_range=tuple(args.input), output_range=tuple(args.output), cv=args.cv,
        seed=seed,
    )  # fmt: skip
    return name, setting, workload


def _build(
    args: argparse.Namespace, runs: list[tuple[str, str, Workload]], scratch: Path
) -> tuple[EngineCore, str]:
    adapters: dict[str, str] = {}
    for _, setting, workload in runs:
        for i, rank in enumerate(SETTINGS[setting].adapter_ranks(workload.num_adapters)):
            adapters.setdefault(_adapter_name(setting, i), random_path(rank, len(adapters)))
    most = max(workload.num_requests for _, _, workload in runs)
    config = EngineConfig(
        model=write_geometry(args.geometry, scratch / "model"),
        random_weights=True,
        adapters=tuple(adapters.items()),
        max_rank=args.max_rank,
        max_model_len=args.input[1] + args.output[1],
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_waiting=most,
        pool_bytes=args.pool_bytes,
        compilation_cache_dir=args.cache_dir,
    )
    core, info = build_core(config, lambda *_: None, make_loader=random_adapter_loader)
    return core, info["device"]


def _adapter_name(setting: str, adapter: int) -> str:
    return f"{setting}-{adapter}"


def _record(
    args: argparse.Namespace, core: EngineCore, device: str, name: str, setting: str,
    workload: Workload,
) -> None:  # fmt: skip
    engine = describe(core, args.geometry)
    core._residency.evict_for(core._pool.num_usable)  # every run starts cold
    requests = generate(workload)
    replay = Replay(
        core, requests, MonotonicClock(), vocab_size=GEOMETRIES[args.geometry]["vocab_size"],
        adapter_name=lambda adapter: _adapter_name(setting, adapter),
    )  # fmt: skip
    gc.collect()  # now, and not in a step
    trace = StepTrace(core, engine)
    try:
        result = replay.run()
    finally:
        trace.close()
    described: dict[str, Any] = {"setting": setting, "rate": workload.rate,
                                 "duration_s": workload.duration_s}  # fmt: skip
    settings = run_settings(
        engine, SETTINGS[setting].adapter_ranks(workload.num_adapters), **described
    )
    head = header(
        bench=BENCH, device=device, settings=settings, seed=workload.seed, commit_name=args.commit
    )
    path = args.out / f"{name}.jsonl"
    path.unlink(missing_ok=True)
    write_run(path, head, trace.steps(), result.outcomes)
    print(f"{name}: {result.counters['steps']} steps, {result.counters['adapter_installs']} "
          f"installs\n{table(summarise(result.outcomes))}", flush=True)  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="tiny")
    parser.add_argument("--run", nargs=5, action="append", required=True,
                        metavar=("NAME", "SETTING", "ADAPTERS", "RATE", "SECONDS"))  # fmt: skip
    parser.add_argument("--input", type=int, nargs=2, default=(8, 512), help="prompts, [from, to)")
    parser.add_argument("--output", type=int, nargs=2, default=(8, 512), help="answers, likewise")
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42, help="of the first run; the next, one more")
    parser.add_argument("--max-rank", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--pool-bytes", type=int)
    parser.add_argument("--cache-dir")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, required=True, help="directory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
