"""Search how the linear kernels work best on this device, shape by shape, and write the table.

    python -m bench.tune_linear --out pallas_kernels/tuning/nvidia-h200.json

Candidates are compiled side by side and run one after the other (`bench/linear_cases.py`). An entry
is written where a kernel beats XLA's time (of weights in bfloat16), or where the weight is of one
byte, which XLA would widen in memory. Several tuners may share a device and the work: `--part 0/4`
takes every fourth shape, `--lock` is a file that is locked while times are taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

from bench.floors import Peaks
from bench.linear_cases import SHAPES, Case, Config, compile_all, describe, locked, time_all
from pallas_kernels import linear_mosaic as mosaic
from pallas_kernels import linear_triton as triton

FEW_ROWS = 16  # whose x is small beside any weight
CHUNK_IN = 128  # one-byte weights that lie together in shared memory
TUNED = ("int8", "bfloat16")  # fp8 works as int8 does


def mosaic_candidates(out_size: int, in_size: int, rows: int, weight_bytes: int) -> list[Config]:
    """Blocks that fill the device once, best filled first.

    x is as large as the weight, or larger, for the cache that it comes from: of one byte and many
    rows, copies of x shared by two blocks are tried too.
    """
    rated: list[tuple[float, Config]] = []
    swap = weight_bytes == 1
    besides = (1, 2) if swap and rows > FEW_ROWS else (1,)
    for split in (1, 2, 4):
        one_wave = math.ceil(out_size * split / mosaic.NUM_BLOCKS / 8) * 8
        blocks_out = ((64, 1), (64, 2), (64, 3), (128, 2)) if swap else ((one_wave, 1),)
        for block_out, groups in blocks_out:
            if block_out > 256 or (block_out == 128 and swap and rows > 64):
                continue
            blocks = math.ceil(out_size / block_out / groups) * split
            waves = math.ceil(blocks / mosaic.NUM_BLOCKS)
            for block_in in (128, 256) if rows <= 64 else (128, 64):
                if in_size % (block_in * split):
                    continue
                fill = blocks / (waves * mosaic.NUM_BLOCKS)
                chunks = (0, CHUNK_IN) if swap and block_in > CHUNK_IN else (0,)
                for beside, chunk_in in itertools.product(besides, chunks):
                    config = mosaic.Config(
                        block_out=block_out, num_groups=groups, block_in=block_in,
                        split_in=split, num_beside=beside, num_stages=2, swap=swap,
                        chunk_in=chunk_in,
                    ).with_most_stages(rows, weight_bytes)  # fmt: skip
                    if config is not None and config.num_stages > 2:
                        rated.append((fill - 0.03 * split - 0.05 * (waves - 1), config))
    return [config for _, config in sorted(rated, key=lambda r: -r[0])]


def triton_candidates(out_size: int, in_size: int, rows: int, weight_bytes: int) -> list[Config]:
    """Tiles with as many programs a processor as its shared memory holds, or one fewer."""
    few = [(64, 256, 4, 3), (128, 128, 4, 4), (32, 256, 4, 4), (64, 128, 4, 6)]
    some = [(128, 64, 8, 5), (128, 128, 8, 3), (64, 128, 4, 3), (256, 64, 8, 4)]
    found: list[Config] = []
    for block_out, block_in, warps, stages in few if rows <= 16 else some:
        smem = stages * block_in * (block_out * weight_bytes + max(16, min(rows, 128)) * 2) + 1024
        resident = min(4, int(228e3 // smem), 64 // warps)
        blocks = math.ceil(out_size / block_out) * math.ceil(rows / 128)
        split = max(1, min(8, resident * mosaic.NUM_BLOCKS // blocks))
        if resident and in_size // block_in >= 2 * split:
            found.append(
                triton.Config(
                    block_out=block_out,
                    block_in=block_in,
                    split_in=split,
                    block_rows=128,
                    num_warps=warps,
                    num_stages=stages,
                )
            )
    return found


def cases(args: argparse.Namespace) -> list[Case]:
    """What to time, the most important first."""
    index, parts = (int(n) for n in args.part.split("/"))
    found: list[tuple[int, Case]] = []
    for shape in list(args.shapes)[index::parts]:
        for dtype in args.dtypes:
            weight_bytes = 2 if dtype == "bfloat16" else 1
            for rows in args.rows:
                sizes = (*SHAPES[shape], rows, weight_bytes)
                if rows <= mosaic.MAX_ROWS:
                    ways = mosaic_candidates(*sizes)[: args.most]
                    found += [(i, Case(shape, dtype, rows, way)) for i, way in enumerate(ways)]
                if dtype != "bfloat16" and args.triton:
                    ways = triton_candidates(*sizes)[: args.triton]
                    found += [(i, Case(shape, dtype, rows, way)) for i, way in enumerate(ways)]
                if rows in args.xla_rows and (dtype == "bfloat16" or rows > mosaic.MAX_ROWS):
                    found.append((0, Case(shape, dtype, rows, None)))
    return [case for _, case in sorted(found, key=lambda ranked: ranked[0])]


def table(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table's entries: the fastest right way of each shape, where it is not XLA."""
    entries: dict[str, dict[str, Any]] = {"linear_mosaic": {}, "linear_triton": {}}
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        case = result["case"]
        groups.setdefault(case.key, []).append(result)
    for key, group in groups.items():
        group.sort(key=lambda result: result["us"])
        case = group[0]["case"]
        num_bytes = math.prod(case.sizes) * case.weight_bytes
        flops = 2 * case.num_rows * math.prod(case.sizes)
        floor = Peaks().floor_s(num_bytes, flops) * 1e6
        line = " ; ".join(f"{describe(r['case'])} {r['us']:.1f}" for r in group[:4])
        print(f"{case.shape} {case.dtype} {case.num_rows}: floor {floor:.1f} | {line}", flush=True)
        right = [result for result in group if result["error"] < 0.01]
        for result in group:
            if result not in right:
                print(f"WRONG by {result['error']}: {result['case']}", flush=True)
        if right and right[0]["case"].config is not None:
            config = dataclasses.asdict(right[0]["case"].config)
            op = f"linear_{right[0]['case'].implementation}"
            entries[op][key] = {"config": config, "us": round(right[0]["us"], 2)}
    return entries


def merged(
    path: Path, entries: dict[str, dict[str, Any]], measured: set[str]
) -> dict[str, dict[str, Any]]:
    """The file's table with these entries, and nothing else for the keys that were measured."""
    held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for op, found in entries.items():
        kept = {key: entry for key, entry in held.get(op, {}).items() if key not in measured}
        held[op] = dict(sorted((kept | found).items()))
    return held


def ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def words(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=words, default=list(SHAPES))
    parser.add_argument("--dtypes", type=words, default=TUNED)
    parser.add_argument("--rows", type=ints, default=[1, 16, 64, 128, 256])
    parser.add_argument("--xla-rows", type=ints, default=[1, 16, 64, 128, 256])
    parser.add_argument("--most", type=int, default=12, help="Mosaic candidates of each shape")
    parser.add_argument("--triton", type=int, default=4, help="Triton candidates of each shape")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument(
        "--compile-s", type=float, default=1e9, help="seconds until which to compile"
    )
    parser.add_argument("--stop-s", type=float, default=1e9, help="seconds for all")
    parser.add_argument("--hang-s", type=float, default=60, help="seconds that a case may take")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    started = time.monotonic()
    found = cases(args)
    programs = compile_all(found, args, started)
    print(f"{len(programs)} of {len(found)} in {time.monotonic() - started:.1f} s", flush=True)
    for results in time_all(programs, args, started):
        entries, measured = table(results), {result["case"].key for result in results}
        with locked(args.lock):
            args.out.write_text(json.dumps(merged(args.out, entries, measured), indent=1) + "\n")
    print(f"done in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
