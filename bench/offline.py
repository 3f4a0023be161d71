"""Throughput of the engine in-process: a fixed set of requests, all at once, to the end.

    python -m bench.offline --geometry llama-7b --requests 1000 --input 256 --output 64 \\
        --max-num-seqs 64 --adapters 1000 --ranks 8 --modes base,cold,warm,disk --out ...

Runs the requests on one engine in one mode after another:

base    on the base model alone
cold    spread over the adapters, which lie in host memory and not on the device
warm    the same again: as many are on the device as fit
disk    spread over adapters that nobody has loaded: each is read from a PEFT directory (in the page
        cache, for it was just written) when its first request arrives
engine  as the mode before it, through the Python interface: threads, texts

They run in this order, for each finds what the one before has left.

Prompts are random token ids, generation is greedy and ignores eos. The result is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.adapter_files import write_adapters
from bench.geometries import GEOMETRIES, write_geometry
from bench.idle import (
    NUM_INSTALLED,
    install_targets,
    measure_installs,
    measure_rows,
    row_targets,
)
from bench.offline_run import run_requests
from bench.random_adapters import random_or_read_loader
from bench.record import command, commit, record
from bench.step_log import raw_step_s
from bench.summary import target
from bench.through_engine import run_through_engine, write_tokenizer
from checkpoints.hf_config import read_model_config
from sloraj.build import build_core
from sloraj.config import EngineConfig
from sloraj.core import EngineCore

NOT_RECORDED = ("out", "cache_dir", "commit", "scratch")  # of this machine, or elsewhere
IDLE_PROMPT = 64  # tokens: what is left of the context must do for all that is measured
MODES = ("base", "cold", "warm", "disk", "engine")


def main() -> None:
    args = _parse()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        model = write_geometry(args.geometry, Path(scratch) / "model")
        write_tokenizer(model, GEOMETRIES[args.geometry]["vocab_size"])
        result = _measure(args, model, Path(scratch))
    record(result, args.out)


def _measure(args: argparse.Namespace, model: str, scratch: Path) -> dict[str, Any]:
    ranks = [int(r) for r in args.ranks.split(",")]
    modes = args.modes.split(",")
    in_memory = args.adapters if "cold" in modes else 0
    names = [f"adapter-{i}" for i in range(in_memory)]
    on_disk = args.adapters if "disk" in modes else 0
    written = write_adapters(scratch, read_model_config(model), ranks, on_disk)
    paths = {f"disk-{i}": path for i, path in enumerate(written)}
    config = EngineConfig(
        model=model,
        served_model_name=args.geometry,
        random_weights=True,
        adapters=tuple(
            (name, f"random:{ranks[i % len(ranks)]}:{i}") for i, name in enumerate(names)
        ),
        max_rank=max(ranks),
        max_model_len=args.input + args.output + 64,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_waiting=args.requests,
        max_adapter_slots=args.adapters + NUM_INSTALLED,
        pool_bytes=args.pool_bytes,
        kernels=args.kernels,
        compilation_cache_dir=args.cache_dir,
    )
    stages: dict[str, float] = {}
    started = time.perf_counter()

    def note(stage: str, done: int, total: int) -> None:
        if done == total:
            stages[f"{stage}_done_s"] = time.perf_counter() - started

    core, info = build_core(config, note, make_loader=random_or_read_loader)
    started_s, runner = time.perf_counter() - started, core.stats()["runner"]
    result: dict[str, Any] = {
        "bench": "offline",
        "device": info["device"],
        "commit": args.commit or commit(),
        "command": command(),
        "jax": jax.__version__,
        "settings": {k: v for k, v in vars(args).items() if k not in NOT_RECORDED},
        "engine": {k: v for k, v in info.items() if k != "model_path"},
        "startup_s": started_s,
        "startup_stages": stages,
        "is_cache_warm": runner["compile_cache_hits"] >= runner["num_programs"],
    }
    if not args.start_only:
        workload = _Workload(args)
        _run_modes(args, core, workload, paths, result)
        core.check_integrity()
    result["runner"] = core.stats()["runner"]
    result["memory"] = jax.devices()[0].memory_stats()
    if "engine" in modes:
        before = modes[modes.index("engine") - 1]
        through = run_through_engine(
            core, info, model, workload.prompts, workload.adapters_of(before), args.output
        )
        over = through["requests_per_s"] / result[before]["requests_per_s"]
        result["through_engine"] = through | {"over_core_alone": over}
    result["targets"] = _targets(args, result)
    return result


def _targets(args: argparse.Namespace, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of the summary; of throughput for the plan's own workload alone."""
    warm = result["is_cache_warm"]
    found = [
        target(
            "10", f"ready with a {'warm' if warm else 'cold'} compilation cache, "
            f"{result['engine']['num_programs']} programs",
            measured=result["startup_s"], limit=60 if warm else 240, unit="s",
        )
    ]  # fmt: skip
    shape = (args.input, args.output, args.max_num_seqs, args.ranks)
    is_planned = shape == (256, 64, 64, "8") and args.requests >= 1000 <= args.adapters
    if is_planned and "base" in result:
        per_s = result["base"]["requests_per_s"]
        found.append(
            target("12", "base", measured=per_s, limit=80, unit="requests/s", is_minimum=True)
        )
        found += [
            target(
                "12", f"{mode}, of base", measured=result[mode]["over_base"], limit=share,
                unit="", is_minimum=True,
            )
            for mode, share in (("warm", 0.93), ("cold", 0.85), ("disk", 0.6))
            if mode in result
        ]  # fmt: skip
    for measured in result.get("idle", ()):
        found += row_targets(measured)
    if "installs" in result:
        found += install_targets(result["installs"])
    if is_planned and "through_engine" in result:
        found.append(
            target(
                "9", "whole Python interface over the core alone", limit=0.97, unit="",
                measured=result["through_engine"]["over_core_alone"], is_minimum=True,
            )
        )  # fmt: skip
    return found


class _Workload:
    """The prompts, and which adapter each request uses."""

    def __init__(self, args: argparse.Namespace) -> None:
        rng = np.random.default_rng(0)
        vocab, num = GEOMETRIES[args.geometry]["vocab_size"], args.requests
        self.prompts = rng.integers(3, vocab, (num, args.input), dtype=np.int32)
        if args.popularity == "distinct":
            self._drawn = [i % args.adapters for i in range(num)]
        else:
            exponent = 1.0 if args.popularity == "zipf" else 0.0
            weights = 1.0 / np.arange(1, args.adapters + 1) ** exponent
            self._drawn = rng.choice(args.adapters, num, p=weights / weights.sum()).tolist()

    def adapters_of(self, mode: str) -> list[str | None]:
        if mode == "base":
            return [None] * len(self._drawn)
        prefix = "disk" if mode == "disk" else "adapter"
        return [f"{prefix}-{i}" for i in self._drawn]


def _run_modes(
    args: argparse.Namespace,
    core: EngineCore,
    workload: _Workload,
    paths: Mapping[str, str],
    result: dict[str, Any],
) -> None:
    """Fill in the result of each mode, and write out what there is after each."""
    rows = args.max_num_seqs
    names: list[str | None] = [None]
    result["raw_base"] = raw_step_s(core, args.input, rows, names)
    for mode in args.modes.split(","):
        if mode == "engine":
            continue
        names = workload.adapters_of(mode)
        result[mode] = run_requests(
            core, workload.prompts, names, args.output, mode, paths if mode == "disk" else {}
        )
        per_s = result[mode]["requests_per_s"]
        if "base" in result:
            result[mode]["over_base"] = per_s / result["base"]["requests_per_s"]
        print(f"{mode}: {per_s:.1f} requests/s", flush=True)
        result["targets"] = _targets(args, result)
        if args.out is not None:  # should the rest not end in its time
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1))
    result["raw_adapters"] = raw_step_s(core, args.input, rows, names)
    if args.idle:
        result["idle"] = [measure_rows(core, r, IDLE_PROMPT) for r in sorted({1, rows})]
        result["installs"] = measure_installs(core, rows, IDLE_PROMPT)


def _modes(text: str) -> str:
    """`text`, if it has modes in their order, "warm" only after "cold", and "engine" after any:
    else a figure would be another mode's.
    """
    modes = tuple(text.split(","))
    is_ordered = modes == tuple(mode for mode in MODES if mode in modes)
    has_sent = "warm" not in modes or "cold" in modes
    if not is_ordered or not has_sent or modes[0] == "engine":
        allowed = "in this order, warm with cold, engine after another"
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: {','.join(MODES)} ({allowed})")
    return text


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-7b")
    parser.add_argument("--modes", type=_modes, default="base,cold,warm", help=",".join(MODES))
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--ranks", default="64,32,16,8")
    parser.add_argument("--popularity", choices=("distinct", "uniform", "zipf"), default="distinct")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--input", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--pool-bytes", type=int)
    parser.add_argument("--kernels", choices=("xla", "triton", "mosaic"))
    parser.add_argument("--cache-dir")
    parser.add_argument("--scratch", help="where adapters are written")
    parser.add_argument("--commit", help="where the tree is not a repository")
    parser.add_argument("--idle", action="store_true", help="then as bench.idle")
    parser.add_argument("--start-only", action="store_true", help="measure start-up alone")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
