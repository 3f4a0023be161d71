"""Search the attention kernels' configurations on this device, and keep the fastest of each shape.

    python -m bench.tune_attention --write

Every configuration of a shape runs the same batches; the one with the least total time is written
to `pallas_kernels/tuning/<device kind>.json`, where the kernels look their shape up.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.attention_cases import Batch, attend, cold_inputs, make_inputs
from bench.floors import Peaks
from bench.kernel_timing import compile_calls, time_compiled
from pallas_kernels import decode_attention_triton as decode_triton
from pallas_kernels import ragged_attention_triton as ragged_triton
from pallas_kernels.shapes import MODELS
from pallas_kernels.tuning_table import device_kind

TABLES = Path("pallas_kernels/tuning")
DECODE_ROWS = (1, 16, 64, 256, 4, 128)  # the engine's buckets, the most telling ones first
FEW_ROWS = 16  # up to here, the time is that of one program after the other
MAX_KV_BYTES = 12e9
COMPILERS = 14  # threads

Entry = tuple[str, str, Any, float]  # op, key, configuration, microseconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An entry of the table: where it stands, what is tried, and on which batches."""

    op: str
    key: str
    configs: tuple[Any, ...]
    batches: tuple[Batch, ...]
    block_q: int = 1


def decode_shape(model: str, rows: int, max_length: int) -> Shape:
    """Contexts a little beyond whole blocks, as most are, and very uneven ones."""
    shape = MODELS[model]
    even = Batch(name="even", model=model, contexts=(525,) * rows, max_length=max_length)
    spread = np.random.default_rng(0).integers(16, max_length, size=rows)
    uneven = dataclasses.replace(even, name="uneven", contexts=tuple(spread.tolist()))
    is_long = max_length > decode_triton.LONGEST_WHOLE
    return Shape(
        op="paged_decode_attention",
        key=decode_triton.table_key(
            head_dim=shape.head_dim,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            num_rows=rows,
            max_length=max_length,
        ),
        configs=tuple(decode_configs(rows, shape.num_kv_heads, is_long=is_long)),
        batches=tuple(batch for batch in (even, uneven) if batch.kv_bytes < MAX_KV_BYTES),
    )


def decode_configs(
    rows: int, num_kv_heads: int, *, is_long: bool
) -> Iterable[decode_triton.Config]:
    extras = [] if is_long else [0]
    if is_long or rows * num_kv_heads < 2048:
        extras += [max(1, 528 // num_kv_heads)]
    loops = [(True, 64, 4, 3), (True, 64, 4, 6), (False, 32, 4, 8)]
    for extra in extras:
        for min_part in (128, 256) if extra and rows <= FEW_ROWS else (256,):
            for edges_apart, block_kv, num_warps, num_stages in loops:
                yield decode_triton.Config(
                    extra_parts=extra, min_part=min_part, heads_first=True,
                    edges_apart=edges_apart, block_kv=block_kv, num_warps=num_warps,
                    num_stages=num_stages,
                )  # fmt: skip


def ragged_shapes(model: str) -> list[Shape]:
    shape = MODELS[model]
    group = shape.num_heads // shape.num_kv_heads
    batches = (
        Batch(name="prompts", model=model, chunks=((0, 512),) * 4),
        Batch(name="prompt", model=model, chunks=((0, 2048),)),
        Batch(name="chunk", model=model, chunks=((6144, 2048),)),
    )
    configs = tuple(
        ragged_triton.Config(
            block_heads=heads,
            units_together=together,
            block_kv=block_kv,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        for heads in (1, group)
        if heads <= group
        for together in (8, 32)
        for block_kv, num_warps, num_stages in (
            *((128, 8, 3), (64, 4, 2), (64, 4, 3), (32, 4, 3), (64, 8, 5)),
        )
    )
    return [
        Shape(
            op="paged_ragged_attention",
            key=ragged_triton.table_key(block_q=block_q, group=group, head_dim=shape.head_dim),
            configs=tuple(dict.fromkeys(configs)),
            batches=batches,
            block_q=block_q,
        )
        for block_q in (64, 128)
    ]


def tune(shape: Shape) -> Entry:
    """The configuration that comes nearest to the floors, over all batches."""
    over_floor = dict.fromkeys(shape.configs, 0.0)
    times = dict.fromkeys(shape.configs, 0.0)
    programs: dict[Any, dict[Any, Any]] = {}  # of each layout of arguments
    num_inputs, num_pages = None, 0
    if not any(batch.chunks for batch in shape.batches):  # then one program serves all batches
        num_inputs = max(cold_inputs(batch) for batch in shape.batches)
        num_pages = 1 + num_inputs * max(
            sum(-(-end // batch.shape.page_size) for end in batch.ends) for batch in shape.batches
        )
    for batch in shape.batches:
        inputs, shared = make_inputs(
            batch, shape.block_q, num_inputs=num_inputs, num_pages=num_pages
        )
        layout = str(jax.tree.map(lambda x: (x.shape, x.dtype), (inputs, shared)))
        if layout not in programs:
            programs[layout] = compile_all(batch, shape.configs, inputs, shared)
        for config, program in programs[layout].items():
            if isinstance(program, Exception):  # more shared memory than there is, for one
                print(f"  {config}: {str(program).splitlines()[0][:100]}", flush=True)
                over_floor[config] = float("inf")
                continue
            seconds = time_compiled(
                program, inputs, num_calls=len(inputs), shared=shared, repeats=3
            )
            times[config] += 1e6 * seconds
            over_floor[config] += seconds / batch.floor_s(Peaks()) / len(shape.batches)
    best = sorted(over_floor, key=over_floor.__getitem__)
    for config in best[:4]:
        print(f"  {times[config]:8.1f} us, {over_floor[config]:.3f} of floor, {config}", flush=True)
    return shape.op, shape.key, best[0], times[best[0]]


def compile_all(
    batch: Batch, configs: tuple[Any, ...], inputs: list[Any], shared: tuple[Any, ...]
) -> dict[Any, Any]:
    """A program of each configuration, or why there is none."""

    def compile_one(config: Any) -> Any:
        tried = {"implementation": "triton", "config": config}
        call = functools.partial(attend, shape=batch.shape, decode=tried, ragged=tried)
        try:
            return compile_calls(call, inputs, num_calls=len(inputs), shared=shared)
        except jax.errors.JaxRuntimeError as error:
            return error

    with ThreadPoolExecutor(COMPILERS) as pool:
        return dict(zip(configs, pool.map(compile_one, configs), strict=True))


def write(entries: list[Entry], path: Path) -> None:
    """Merge into the table of this device kind."""
    table = json.loads(path.read_text()) if path.is_file() else {}
    for op, key, config, us in entries:
        entry = {"config": dataclasses.asdict(config), "us": round(us, 2)}
        table.setdefault(op, {})[key] = entry
    table = {op: dict(sorted(table[op].items())) for op in sorted(table)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["llama-7b", "llama-3.1-8b"])
    parser.add_argument("--only", nargs="*", help="substrings of ops or keys")
    parser.add_argument("--write", action="store_true", help="keep the fastest ones")
    parser.add_argument("--tables", type=Path, default=TABLES)
    parser.add_argument("--rows", type=int, nargs="*", default=list(DECODE_ROWS))
    parser.add_argument("--long", action="store_true", help="also where rows may be long")
    parser.add_argument("--seconds", type=float, help="after these no other shape is begun")
    args = parser.parse_args()
    started = time.perf_counter()
    shapes = [
        decode_shape(model, rows, max_length)
        for rows in args.rows
        for max_length in (decode_triton.LONGEST_WHOLE, 4 * decode_triton.LONGEST_WHOLE)
        if args.long or max_length == decode_triton.LONGEST_WHOLE
        for model in args.models
    ]
    shapes += [shape for model in args.models for shape in ragged_shapes(model)]
    for shape in shapes:
        if args.only and not any(part in f"{shape.op} {shape.key}" for part in args.only):
            continue
        if args.seconds is not None and time.perf_counter() - started > args.seconds:
            print(f"left out for lack of time: {shape.op} {shape.key}", flush=True)
            continue
        print(f"{shape.op} {shape.key}", flush=True)
        entry = tune(shape)
        if args.write:
            write([entry], args.tables / f"{device_kind()}.json")


if __name__ == "__main__":
    main()
