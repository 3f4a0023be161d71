"""Time of the LoRA kernels of one layer on a GPU: real shapes x ranks x popularities, cold caches.

    python -m bench.kernels_lora --out bench/results/nvidia-h200/kernels-lora.json

A case is what one layer runs: shrink and expand of q, k, v and of o (or of gate, up and of down),
each over other inputs than the call before. Decode is judged by the bytes of A and B, prefill by
the layer's base products at the device's best rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.floors import Peaks, limit_s
from bench.kernel_timing import time_compiled_chain
from bench.lora_inputs import Adapters, common_tables, cut_tiles, fill_pool, make_adapters
from bench.record import command, commit, record
from bench.summary import target
from checkpoints.model_config import TARGET_MODULES
from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_shrink import lora_shrink
from pallas_kernels.shapes import MODELS, ModelShape, row_slots
from pallas_kernels.tiles import LoraTiles
from sloraj.runner.buckets import MIXED_BLOCK_ROWS, SINGLE_BLOCK_ROWS

RANKS: dict[str, tuple[int, ...]] = {
    "8": (8,), "16": (16,), "32": (32,), "64": (64,), "mixed": (64, 32, 16, 8),
}  # fmt: skip
GROUPS = {"attention": ((0, 1, 2), (3,)), "mlp": ((4, 5), (6,))}  # modules that share an input
MAX_RANK = 64
DECODE_MODELS = ("llama-7b", "llama-3.1-8b")
BESIDE_DECODE = "beside-decode"  # a prompt's rows in a step in which 64 others decode
DECODING = 64
SHARES = {"8": 0.5, "16": 0.7, "32": 0.7, "64": 0.85}  # of the read bandwidth, in decode
PREFILL_SHARES = {"16": 0.10, "64": 0.15}  # of the base products
CACHE_BYTES = 200e6  # inputs rotate over at least so much
SPARE_TILES = 128  # what a bucket of prefill adds for sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One layer's LoRA in one step: the first `num_rows` rows over `num_slots` adapters."""

    model: str
    group: str
    num_rows: int
    rank: str
    popularity: str
    num_slots: int = 64
    num_layers: int = 64  # in a program: so many that launching it hides behind its work

    @property
    def is_decode(self) -> bool:
        return self.num_rows <= 256 and self.popularity != BESIDE_DECODE

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model]

    @property
    def modules(self) -> tuple[int, ...]:
        return tuple(module for modules in GROUPS[self.group] for module in modules)

    @property
    def num_sets(self) -> int:
        """Layers that have bytes of their own, so that none finds its own in a cache."""
        rank = float(np.mean(RANKS[self.rank]))
        size = sum(sum(self.shape.module_sizes(module)) for module in self.modules)
        num_used = 1 if self.popularity == "identical" else min(self.num_slots, self.num_rows)
        return int(min(self.num_layers, np.ceil(CACHE_BYTES / (2 * rank * size * num_used))))

    def base_flops(self) -> float:
        """Operations of all of a layer's own matrix products."""
        sizes = [self.shape.module_sizes(module) for module in range(len(TARGET_MODULES))]
        return 2.0 * self.num_rows * sum(size_in * size_out for size_in, size_out in sizes)


def decode_cases() -> Iterator[Case]:
    for model in DECODE_MODELS:
        for group in GROUPS:
            for rank in RANKS:
                yield Case(model=model, group=group, num_rows=64, rank=rank, popularity="distinct")
    for popularity in ("uniform", "zipf", "identical", "base-only"):
        for rank in ("8", "64", "mixed"):
            yield Case(
                model="llama-7b", group="attention", num_rows=64, rank=rank, popularity=popularity
            )
    for num_rows in (1, 8, 256):
        for rank in ("8", "64"):
            yield Case(
                model="llama-7b", group="attention", num_rows=num_rows, rank=rank,
                popularity="distinct", num_slots=num_rows,
            )  # fmt: skip


def prefill_cases() -> Iterator[Case]:
    for num_rows, rank in itertools.product((256, 512), ("8", "16", "64")):
        yield Case(
            model="llama-7b", group="attention", num_rows=num_rows, rank=rank,
            popularity=BESIDE_DECODE, num_slots=1, num_layers=8,
        )  # fmt: skip
    for model in DECODE_MODELS:
        for num_rows in (2048, 8192):
            for rank in ("16", "64"):
                for num_slots in (1, 4, 16, 64):
                    yield Case(
                        model=model, group="attention", num_rows=num_rows, rank=rank,
                        popularity="uniform", num_slots=num_slots, num_layers=8,
                    )  # fmt: skip


def compile_layers(case: Case, adapters: Any, kernels: str) -> Any:
    """A program of many layers, `(base, x, *adapters) -> base`; adapters may be shapes."""
    groups, out_sizes = GROUPS[case.group], _out_sizes(case)

    @jax.jit  # lowered once for all layers
    def one_layer(index: Any, base: Any, x: Any, *adapters: Any) -> Any:
        pool, slot_pages, tiles = adapters
        place = (pool, slot_pages, index, tiles)
        results = []
        for y, h, modules, sizes in zip(base, x, groups, out_sizes, strict=True):
            v = lora_shrink(
                h, *place, modules=modules, num_rows=MAX_RANK, rank_split=1, implementation=kernels
            )
            y = lora_expand(
                y, v, *place, jnp.int32(0), modules=modules, out_sizes=sizes,
                implementation=kernels,
            )  # fmt: skip
            results.append(y)
        return results

    def layers(base: Any, *arguments: Any) -> Any:
        for index in range(case.num_layers):
            base = one_layer(jnp.int32(index), base, *arguments)
        return base

    base, x = jax.eval_shape(lambda: rows_of(case))
    return jax.jit(layers, donate_argnums=0).lower(base, x, *adapters).compile()


def _out_sizes(case: Case) -> list[tuple[int, ...]]:
    return [tuple(case.shape.module_sizes(m)[1] for m in ms) for ms in GROUPS[case.group]]


def rows_of(case: Case) -> tuple[list[jax.Array], list[jax.Array]]:
    """(base, x) of each group of modules."""
    widths = [case.shape.module_sizes(modules[0])[0] for modules in GROUPS[case.group]]
    base = [jnp.zeros((case.num_rows, sum(sizes)), jnp.bfloat16) for sizes in _out_sizes(case)]
    return base, [jnp.full((case.num_rows, width), 1e-3, jnp.bfloat16) for width in widths]


def batch_slots(case: Case) -> np.ndarray:
    """The slot of each row; rows of a slot adjoin, as those of one prompt do.

    beside-decode: all rows but the first, which decode, are one prompt's.
    """
    if case.popularity == BESIDE_DECODE:
        return (np.arange(case.num_rows) >= DECODING).astype(np.int32)
    return np.sort(row_slots(case.popularity, case.num_rows, case.num_slots, seed=0))


def step_tiles(case: Case, adapters: Adapters) -> LoraTiles:
    """The tiles of the case's batch, as a step has them."""
    block_rows = SINGLE_BLOCK_ROWS if case.is_decode else MIXED_BLOCK_ROWS
    capacity = case.num_rows if case.is_decode else case.num_rows // block_rows + SPARE_TILES
    return cut_tiles(batch_slots(case), adapters, block_rows=block_rows, capacity=capacity)


def make_world(case: Case) -> Adapters:
    ranks = [int(rank) for rank in np.resize(RANKS[case.rank], case.num_slots)]
    return make_adapters(
        case.shape, ranks, case.modules, num_layers=case.num_layers, num_sets=case.num_sets
    )


def judge(case: Case, adapters: Adapters, seconds: float, peaks: Peaks) -> dict[str, Any]:
    """The row of a result: what was measured, its floor and its target."""
    floor_s = peaks.floor_s(adapters.num_bytes(batch_slots(case), case.modules))
    target_s = None
    if case.is_decode and case.popularity == "distinct" and case.rank in SHARES:
        target_s = limit_s(floor_s, SHARES[case.rank])
    if not case.is_decode and case.popularity != BESIDE_DECODE:
        base_s = case.base_flops() / peaks.flops_per_s
        target_s = base_s * PREFILL_SHARES[case.rank]
    return {
        **dataclasses.asdict(case),
        "us": round(seconds * 1e6, 2),
        "floor_us": round(floor_s * 1e6, 2),
        "target_us": None if target_s is None else round(target_s * 1e6, 2),
        "met": None if target_s is None else seconds <= target_s,
    }


def measure(
    cases: list[Case], peaks: Peaks, *, kernels: str = "triton", num_threads: int = 8
) -> Iterator[dict[str, Any]]:
    """Rows of results. Cases of one shape share a program; all are compiled before any is timed."""
    families: dict[Any, list[Case]] = {}
    for case in cases:
        key = (case.model, case.group, case.num_rows, case.num_layers)
        families.setdefault(key, []).append(case)
    worlds = {case: make_world(case) for case in cases}
    pools: dict[Any, int] = {}
    tables: dict[Case, np.ndarray] = {}
    for key, members in families.items():
        pools[key], padded = common_tables([worlds[case] for case in members])
        tables |= dict(zip(members, padded, strict=True))

    def compile_family(key: Any) -> Any:
        case = families[key][0]
        pool = jax.ShapeDtypeStruct((pools[key], case.shape.page_elems), jnp.bfloat16)
        return compile_layers(case, (pool, tables[case], step_tiles(case, worlds[case])), kernels)

    with ThreadPoolExecutor(num_threads) as compilers:
        programs = list(compilers.map(compile_family, families))
    for (key, members), program in zip(families.items(), programs, strict=True):
        pool = fill_pool(pools[key], members[0].shape.page_elems)
        for case in members:
            base, x = rows_of(case)
            arguments = (x, pool, jnp.asarray(tables[case]), step_tiles(case, worlds[case]))
            seconds = time_compiled_chain(program, base, arguments, case.num_layers)
            yield judge(case, worlds[case], seconds, peaks)


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbered targets that these rows decide, none for cases that were not run."""
    found = []
    for row in rows:
        if row["target_us"] is not None and row["num_rows"] == 64:
            name = f"LoRA decode, {row['model']}, {row['group']}, rank {row['rank']}, 64 distinct"
            found.append(_target("1", name, row["us"], row["target_us"], row["floor_us"]))
    for model, group in itertools.product(DECODE_MODELS, GROUPS):
        distinct = {
            row["rank"]: row["us"]
            for row in rows
            if (row["model"], row["group"], row["num_rows"]) == (model, group, 64)
            and row["popularity"] == "distinct"
        }
        if distinct.keys() == RANKS.keys():
            mean = float(np.mean([distinct[str(rank)] for rank in RANKS["mixed"]]))
            name = f"LoRA decode, {model}, {group}, mixed ranks by the mean of uniform ones"
            found.append(_target("1", name, distinct["mixed"], 1.05 * mean))
        for row in rows:
            if (row["model"], row["group"], row["popularity"]) == (model, group, "identical"):
                name = f"LoRA decode, {model}, {group}, rank {row['rank']}, one shared"
                found.append(_target("1", name, row["us"], distinct[row["rank"]]))
    prefill = [row for row in rows if row["num_rows"] > 256 and row["target_us"] is not None]
    for model, num_rows, rank in sorted({(r["model"], r["num_rows"], r["rank"]) for r in prefill}):
        times = {
            row["num_slots"]: row
            for row in prefill
            if (row["model"], row["num_rows"], row["rank"]) == (model, num_rows, rank)
        }
        slowest = max(times.values(), key=lambda row: row["us"])
        name = f"LoRA prefill, {model}, {num_rows} tokens, rank {rank}, 1 to {max(times)} adapters"
        found.append(_target("2", name, slowest["us"], slowest["target_us"], slowest["floor_us"]))
    return found


def _target(
    number: str, name: str, us: float, limit: float, floor: float | None = None
) -> dict[str, Any]:
    return target(number, name, measured=us, limit=limit, unit="us a layer", floor=floor)


def main() -> None:
    args = _parse()
    cases = [] if args.only == "prefill" else list(decode_cases())
    cases += [] if args.only == "decode" else list(prefill_cases())
    rows = []
    for row in measure(cases, Peaks(), num_threads=args.threads):
        rows.append(row)
        print(
            f"{row['model']:13} {row['group']:9} {row['num_rows']:5} rows  rank {row['rank']:5} "
            f"{row['popularity']:9} {row['num_slots']:3} slots  {row['us']:8.2f} us  "
            f"floor {row['floor_us']:7.2f}  target {row['target_us']}  {row['met']}",
            flush=True,
        )
    result = {
        "device": jax.devices()[0].device_kind,
        "commit": args.commit or commit(),
        "command": command(),
        "targets": targets(rows),
        "cases": rows,
    }
    record(result, args.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where the tree is not a repository")
    return parser.parse_args()


if __name__ == "__main__":
    main()
