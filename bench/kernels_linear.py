"""Time of the linear layers that decode reads, as an engine on this device would compute them.

    python -m bench.kernels_linear --out bench/results/nvidia-h200/kernels-linear.json

Each base product of a geometry in bfloat16, int8 and fp8, by the kernel that the device's table
gives, with XLA's matmul of bfloat16 weights beside it; times are of kernels, from a profiler trace
(what a step adds between kernels is in `bench.step`). Targets: at least 92% of the read bandwidth,
or 4 us above a floor of less than 20 us.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.floors import limit_s
from bench.linear_cases import DTYPES, SHAPES, Case, compile_all, describe, time_all
from bench.peaks import measure_peaks
from bench.record import command, commit, record
from bench.summary import worst_target
from bench.tune_linear import ints, words
from pallas_kernels.linear import chosen_config

SHARE = 0.92  # of the read bandwidth


def chosen(shape: str, dtype: str, rows: int) -> Case:
    """The case as an engine on Hopper computes it."""
    out_size, in_size = SHAPES[shape]
    config = chosen_config(
        jax.ShapeDtypeStruct((rows, in_size), jnp.bfloat16),
        jax.ShapeDtypeStruct((out_size, in_size), DTYPES[dtype]),
        "mosaic",
    )
    return Case(shape, dtype, rows, config)


def targets(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What target 4 names of products, each type and number of rows by its worst shape."""
    found = []
    for dtype, rows in sorted({(entry["dtype"], entry["rows"]) for entry in entries}):
        mine = [entry for entry in entries if (entry["dtype"], entry["rows"]) == (dtype, rows)]
        # of two ways the engine's is judged, which is XLA where there is no other
        ways = {entry["shape"]: entry for entry in sorted(mine, key=lambda e: e["way"] != "xla")}
        what = f"products of {rows} rows, {dtype}"
        found.append(worst_target("4", what, list(ways.values()), "shape", plural="shapes"))
    return found


def main() -> None:
    args = _parse()
    args.lock, args.hang_s = None, 10.0
    started = time.monotonic()
    peaks = measure_peaks()
    found = [chosen(s, d, r) for r in args.rows for s in args.shapes for d in args.dtypes]
    found += [Case(s, "bfloat16", r, None) for r in args.rows for s in args.shapes]
    programs = compile_all(list(dict.fromkeys(found)), args, started)
    results = [result for group in time_all(programs, args, started) for result in group]
    entries: list[dict[str, Any]] = []
    for result in results:
        case = result["case"]
        size = math.prod(case.sizes)
        floor = peaks.floor_s(size * case.weight_bytes, 2 * case.num_rows * size)
        entries.append(
            {
                "shape": case.shape,
                "dtype": case.dtype,
                "rows": case.num_rows,
                "way": describe(case),
                "us": result["us"],
                "floor_us": floor * 1e6,
                "share": floor * 1e6 / result["us"],
                "limit_us": limit_s(floor, SHARE) * 1e6,
                "error": result["error"],
            }
        )
    record(
        {
            "bench": "kernels_linear",
            "command": command(),
            "device": jax.devices()[0].device_kind,
            "commit": args.commit or commit(),
            "jax": jax.__version__,
            "read_bytes_per_s": peaks.read_bytes_per_s,
            "results": entries,
            "targets": targets(entries),
        },
        args.out,
    )
    for entry in entries:
        print(
            f"{entry['shape']:12} {entry['dtype']:9} {entry['rows']:4d} rows "
            f"{entry['us']:7.1f} us, floor {entry['floor_us']:6.1f} ({entry['share']:.0%}) "
            f"{'met' if entry['us'] <= entry['limit_us'] else '   '} {entry['way']}"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=words, default=["7b.qkv", "o", "7b.gate_up", "7b.down"])
    parser.add_argument("--dtypes", type=words, default=list(DTYPES))
    parser.add_argument("--rows", type=ints, default=[64, 1])
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument(
        "--compile-s", type=float, default=1e9, help="seconds until which to compile"
    )
    parser.add_argument("--stop-s", type=float, default=1e9, help="seconds for all")
    parser.add_argument("--commit", help="where the tree is not a repository")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
