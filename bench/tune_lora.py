"""Search configurations of the Triton LoRA kernels on a GPU, and keep the best in the table.

    python -m bench.tune_lora --models llama-7b llama-3.1-8b --rows 1 8 64 256

A configuration serves every rank, so it is judged by the product of its times at several ranks.
Shapes that are not searched keep what the table has for them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernel_timing import time_compiled, time_compiled_chain
from bench.kernels_lora import GROUPS, MAX_RANK, Case, make_world, step_tiles
from bench.lora_inputs import Adapters
from pallas_kernels import lora_expand_triton, lora_shrink_triton
from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_shrink import lora_shrink
from pallas_kernels.shapes import MODELS
from pallas_kernels.tuning_table import device_kind

Config = lora_shrink_triton.Config | lora_expand_triton.Config
DECODE_RANKS = ("8", "64")
PREFILL_RANKS = ("16", "64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """One op on modules that share an input, at one number of rows."""

    op: str
    modules: tuple[int, ...]
    case: Case  # its rank is replaced by each in turn

    def key(self, adapters: Adapters) -> str:
        """The key of its shape in the table."""
        tiles = step_tiles(self.case, adapters)
        sizes = [self.case.shape.module_sizes(module) for module in self.modules]
        if self.op == "lora_shrink":
            return lora_shrink_triton.find_config(
                tiles, block_rows=tiles.block_rows, width=sizes[0][0],
                num_modules=len(self.modules), num_rows=MAX_RANK,
            )[0]  # fmt: skip
        width = sum(size_out for _, size_out in sizes)
        return lora_expand_triton.find_config(
            tiles, block_rows=tiles.block_rows, width=width, num_ranks=MAX_RANK
        )[0]


def candidates(search: Search) -> Iterator[Config]:
    """What may be good: enough loads under way, and few enough registers."""
    shrink, expand = lora_shrink_triton.Config, lora_expand_triton.Config
    if search.op == "lora_shrink" and search.case.is_decode:
        for shares, ranks, warps in itertools.product((2, 4, 8, 16, 32, 64), (1, 2, 4), (4, 8)):
            if ranks * 4 >= warps:
                yield shrink(num_shares=shares, row_ranks=ranks, num_warps=warps)
    elif search.op == "lora_shrink":
        for shares, ranks, chunks, stages in itertools.product(
            (1, 2, 4), (16, 32, 64), (1, 2), (3, 4)
        ):
            if shares * ranks <= MAX_RANK:
                yield shrink(
                    num_shares=shares, tile_ranks=ranks, tile_chunks=chunks, num_warps=4,
                    num_stages=stages,
                )  # fmt: skip
    elif search.case.is_decode:
        for chunks, ranks, warps in itertools.product((1, 2, 4, 8, 16), (4, 8, 16, 32), (1, 2, 4)):
            if 4 <= chunks * ranks // (2 * warps) <= 16:
                yield expand(block_chunks=chunks, row_ranks=ranks, num_warps=warps)
    else:
        for chunks, ranks, columns in itertools.product((1, 2, 4), (16, 32, 64), (32, 64, 128)):
            yield expand(block_chunks=chunks, tile_ranks=ranks, tile_columns=columns, num_warps=4)


def compile_op(search: Search, case: Case, adapters: Adapters, config: Any) -> Callable[[], float]:
    """Compile one op over many layers; the result times it, in seconds a call."""
    num_rows, modules = case.num_rows, search.modules
    sizes = [case.shape.module_sizes(module) for module in modules]
    place = (adapters.pool, adapters.slot_pages)
    tiles = step_tiles(case, adapters)
    if search.op == "lora_shrink":
        x = jnp.full((num_rows, sizes[0][0]), 1e-3, jnp.bfloat16)

        @jax.jit
        def shrink(layer: Any, x: Any, pool: Any, slot_pages: Any, tiles: Any) -> Any:
            return lora_shrink(
                x, pool, slot_pages, layer, tiles, modules=modules, num_rows=MAX_RANK,
                rank_split=1, implementation="triton", config=config,
            )  # fmt: skip

        def shrink_all(inputs: Any, shared: Any) -> Any:
            return [shrink(jnp.int32(i), *shared) for i in range(case.num_layers)]

        shared = (x, *place, tiles)
        program = jax.jit(shrink_all).lower([], shared).compile()
        return lambda: time_compiled(program, [], num_calls=case.num_layers, shared=shared)

    out_sizes = tuple(size_out for _, size_out in sizes)
    v = jnp.full((num_rows, len(modules), MAX_RANK), 1e-3, jnp.float32)

    @jax.jit
    def expand(layer: Any, y: Any, v: Any, pool: Any, slot_pages: Any, tiles: Any) -> Any:
        return lora_expand(
            y, v, pool, slot_pages, layer, tiles, jnp.int32(0), modules=modules,
            out_sizes=out_sizes, implementation="triton", config=config,
        )  # fmt: skip

    def expand_all(y: Any, *arguments: Any) -> Any:
        for i in range(case.num_layers):
            y = expand(jnp.int32(i), y, *arguments)
        return y

    def start() -> jax.Array:
        return jnp.zeros((num_rows, sum(out_sizes)), jnp.bfloat16)

    arguments = (v, *place, tiles)
    expand_program = jax.jit(expand_all, donate_argnums=0).lower(start(), *arguments).compile()
    return lambda: time_compiled_chain(expand_program, start(), arguments, case.num_layers)


def search_one(search: Search, compilers: ThreadPoolExecutor) -> tuple[str, dict[str, Any]]:
    """The key of a shape and its best entry."""
    ranks = DECODE_RANKS if search.case.is_decode else PREFILL_RANKS
    cases = [dataclasses.replace(search.case, rank=rank) for rank in ranks]
    worlds = [make_world(case) for case in cases]
    tried: list[tuple[Config, list[Future[Callable[[], float]]]]] = [
        (
            config,
            [
                compilers.submit(compile_op, search, case, world, config)
                for case, world in zip(cases, worlds, strict=True)
            ],
        )
        for config in candidates(search)
    ]
    best: tuple[float, Config, list[float]] | None = None
    finished = [(config, [timer.result() for timer in timers]) for config, timers in tried]
    for config, timers in finished:
        seconds = [timer() for timer in timers]
        score = math.prod(seconds)
        if best is None or score < best[0]:
            best = score, config, seconds
    assert best is not None
    us = {rank: round(s * 1e6, 2) for rank, s in zip(ranks, best[2], strict=True)}
    return search.key(worlds[0]), {"config": dataclasses.asdict(best[1]), "us": us}


def searches(models: list[str], num_rows: list[int], groups: list[str]) -> Iterator[Search]:
    for model, rows, group in itertools.product(models, num_rows, groups):
        case = Case(
            model=model, group=group, num_rows=rows, rank="8", num_slots=min(rows, 64),
            popularity="distinct", num_layers=64 if rows <= 256 else 8,
        )  # fmt: skip
        for modules, op in itertools.product(GROUPS[group], ("lora_shrink", "lora_expand")):
            yield Search(op=op, modules=modules, case=case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["llama-7b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[64])
    parser.add_argument("--groups", nargs="+", choices=sorted(GROUPS), default=["attention"])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--out", type=Path, help="default: the table of this device kind")
    args = parser.parse_args()
    out = args.out or Path("pallas_kernels/tuning") / f"{device_kind()}.json"
    table = json.loads(out.read_text()) if out.is_file() else {}
    with ThreadPoolExecutor(args.threads) as compilers:
        for search in searches(args.models, args.rows, args.groups):
            key, entry = search_one(search, compilers)
            table.setdefault(search.op, {})[key] = entry
            print(search.op, key, entry, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
