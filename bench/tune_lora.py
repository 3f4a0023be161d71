"""Search configurations of the Triton LoRA kernels on a GPU, and keep the best in the table.

    python -m bench.tune_lora --models llama-7b llama-3.1-8b --rows 1 8 64 256
    python -m bench.tune_lora --rows --beside 256    # a prompt's tiles, 64 more rows decoding

A configuration serves every rank, so it is judged by the product of its times at several ranks.
The times in the table are of expand alone, and of shrink with the expand after it. One kernel for
single rows is in the table where it beats shrink and expand, as they are tuned by then; its time is
with an addition to the rows, which makes one layer wait for the other. Shapes that are not searched
keep what the table has for them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernel_timing import time_compiled_chain
from bench.kernels_lora import BESIDE_DECODE, GROUPS, MAX_RANK, Case, make_world, step_tiles
from bench.lora_inputs import Adapters, common_tables, fill_pool
from pallas_kernels import lora_expand_triton, lora_rows_triton, lora_shrink_triton
from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_rows import lora_rows, table_key
from pallas_kernels.lora_shrink import lora_shrink
from pallas_kernels.shapes import MODELS
from pallas_kernels.tuning_table import device_kind

ONE_KERNEL = "lora_rows"
OPS = ("lora_shrink", "lora_expand", ONE_KERNEL)
TWO_KERNELS = None  # in place of its configuration
Config = lora_shrink_triton.Config | lora_expand_triton.Config | lora_rows_triton.Config | None
DECODE_RANKS = ("8", "64")
PREFILL_RANKS = ("16", "64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """One op on modules that share an input, at one number of rows."""

    op: str
    modules: tuple[int, ...]
    case: Case  # its rank is replaced by each in turn

    @property
    def is_beside(self) -> bool:
        """Whether most rows of the step decode: a few tiles, which no other work hides."""
        return self.case.popularity == BESIDE_DECODE

    def key(self, adapters: Adapters) -> str:
        """The key of its shape in the table."""
        tiles = step_tiles(self.case, adapters)
        sizes = [self.case.shape.module_sizes(module) for module in self.modules]
        if self.op == ONE_KERNEL:
            out_sizes = tuple(size_out for _, size_out in sizes)
            return table_key(self.case.num_rows, sizes[0][0], out_sizes)
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
    if search.op == ONE_KERNEL:
        yield TWO_KERNELS
        for chunks, ranks, warps in itertools.product((4, 8, 16, 32), (2, 4, 8), (4, 8)):
            if ranks == warps or 2 * ranks == warps:
                yield lora_rows_triton.Config(block_chunks=chunks, row_ranks=ranks, num_warps=warps)
    elif search.op == "lora_shrink" and search.case.is_decode:
        for shares, ranks, warps in itertools.product((2, 4, 8, 16, 32, 64), (1, 2, 4), (4, 8)):
            if ranks * 4 >= warps:
                yield shrink(num_shares=shares, row_ranks=ranks, num_warps=warps)
    elif search.op == "lora_shrink" and search.is_beside:
        for (stages, chunks), warps, parts in itertools.product(
            ((2, 1), (3, 1), (5, 1), (6, 1), (2, 2), (3, 2), (2, 4)), (4, 8), (1, 2, 4, 8)
        ):
            yield shrink(
                num_shares=4, num_stages=stages, num_warps=warps, row_ranks=2, tile_ranks=16,
                tile_chunks=chunks, num_parts=parts,
            )  # fmt: skip
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
    elif search.is_beside:
        for chunks, columns, warps in itertools.product((1, 2, 4), (32, 64, 128), (4, 8)):
            yield expand(block_chunks=chunks, tile_columns=columns, num_warps=warps, row_ranks=16)
    else:
        for chunks, ranks, columns in itertools.product((1, 2, 4), (16, 32, 64), (32, 64, 128)):
            yield expand(block_chunks=chunks, tile_ranks=ranks, tile_columns=columns, num_warps=4)


def compile_op(search: Search, adapters: Any, config: Any) -> Any:
    """A program of one op over many layers, `(y, x, v, *adapters) -> y`; adapters may be shapes.

    Shrink is timed with the expand that reads it: a program that returned what every layer's shrink
    makes would spend its time on allocating results.
    """
    case = search.case
    modules = search.modules
    sizes = [case.shape.module_sizes(module) for module in modules]
    out_sizes = tuple(size_out for _, size_out in sizes)

    @jax.jit
    def one_layer(layer: Any, y: Any, x: Any, v: Any, *adapters: Any) -> Any:
        pool, slot_pages, tiles = adapters
        place = (pool, slot_pages, layer, tiles)
        if search.op == ONE_KERNEL:
            delta = single_rows(y, place, modules, out_sizes, config)
            width = min(y.shape[1], delta.shape[1])
            return y.at[:, :width].add(delta[:, :width].astype(y.dtype))
        expand_config = config
        if search.op == "lora_shrink":
            expand_config = None
            v = lora_shrink(
                x, *place, modules=modules, num_rows=MAX_RANK, rank_split=1,
                implementation="triton", config=config,
            )  # fmt: skip
        return lora_expand(
            y, v, *place, jnp.int32(0), modules=modules, out_sizes=out_sizes,
            implementation="triton", config=expand_config,
        )  # fmt: skip

    def layers(y: Any, *arguments: Any) -> Any:
        for i in range(case.num_layers):
            y = one_layer(jnp.int32(i), y, *arguments)
        return y

    rows = jax.eval_shape(lambda: rows_of(search))
    return jax.jit(layers, donate_argnums=0).lower(*rows, *adapters).compile()


def single_rows(
    x: jax.Array,
    place: tuple[Any, ...],
    modules: tuple[int, ...],
    out_sizes: tuple[int, ...],
    config: lora_rows_triton.Config | None,
) -> jax.Array:
    """What adapters add to single rows, by one kernel or by two."""
    if config is not TWO_KERNELS:
        return lora_rows(
            x, *place, modules=modules, out_sizes=out_sizes, max_rank=MAX_RANK,
            implementation="triton", config=config,
        )  # fmt: skip
    v = lora_shrink(
        x, *place, modules=modules, num_rows=MAX_RANK, rank_split=1, implementation="triton"
    )
    pool, slot_pages, layer, tiles = place
    return lora_expand(
        None, v, pool, slot_pages, layer, tiles, jnp.int32(0), modules=modules,
        out_sizes=out_sizes, implementation="triton",
    )  # fmt: skip


def rows_of(search: Search) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y, x, v); of one kernel for single rows y is what it reads, too."""
    num_rows, modules = search.case.num_rows, search.modules
    sizes = [search.case.shape.module_sizes(module) for module in modules]
    width = sizes[0][0] if search.op == ONE_KERNEL else sum(size_out for _, size_out in sizes)
    return (
        jnp.zeros((num_rows, width), jnp.bfloat16),
        jnp.full((num_rows, sizes[0][0]), 1e-3, jnp.bfloat16),
        jnp.full((num_rows, len(modules), MAX_RANK), 1e-3, jnp.float32),
    )


def search_one(search: Search, compilers: ThreadPoolExecutor) -> tuple[str, dict[str, Any] | None]:
    """The key of a shape and its best entry; none where two kernels are faster than one."""
    ranks = DECODE_RANKS if search.case.is_decode or search.is_beside else PREFILL_RANKS
    cases = [dataclasses.replace(search.case, rank=rank) for rank in ranks]
    worlds = [make_world(case) for case in cases]
    num_pages, tables = common_tables(worlds)
    page_elems = search.case.shape.page_elems
    tiles = [step_tiles(case, world) for case, world in zip(cases, worlds, strict=True)]
    shapes = (jax.ShapeDtypeStruct((num_pages, page_elems), jnp.bfloat16), tables[0], tiles[0])
    tried = list(candidates(search))
    programs = list(compilers.map(lambda config: compile_op(search, shapes, config), tried))
    pool = fill_pool(num_pages, page_elems)
    best: tuple[float, Config, list[float]] | None = None
    for config, program in zip(tried, programs, strict=True):
        seconds = []
        for table, cut in zip(tables, tiles, strict=True):
            y, x, v = rows_of(search)
            arguments = (x, v, pool, jnp.asarray(table), cut)
            seconds.append(time_compiled_chain(program, y, arguments, search.case.num_layers))
        score = math.prod(seconds)
        if search.op == ONE_KERNEL:
            print(f"  {config}", *(f"{s * 1e6:.1f}" for s in seconds), flush=True)
        if best is None or score < best[0]:
            best = score, config, seconds
    assert best is not None
    if best[1] is TWO_KERNELS:
        return search.key(worlds[0]), None
    us = {rank: round(s * 1e6, 2) for rank, s in zip(ranks, best[2], strict=True)}
    return search.key(worlds[0]), {"config": dataclasses.asdict(best[1]), "us": us}


def searches(
    models: list[str], num_rows: list[int], beside: list[int], groups: list[str]
) -> Iterator[Search]:
    batches = [("distinct", rows) for rows in num_rows]
    batches += [(BESIDE_DECODE, tokens) for tokens in beside]
    for model, (popularity, rows), group in itertools.product(models, batches, groups):
        is_decode = popularity == "distinct" and rows <= 256
        case = Case(
            model=model, group=group, num_rows=rows, rank="8", popularity=popularity,
            num_slots=min(rows, 64) if popularity == "distinct" else 1,
            num_layers=64 if is_decode else 8,
        )  # fmt: skip
        ops = ("lora_shrink", "lora_expand") + ((ONE_KERNEL,) if is_decode else ())
        for modules, op in itertools.product(GROUPS[group], ops):
            yield Search(op=op, modules=modules, case=case)


def keep(entries: dict[str, Any], key: str, entry: dict[str, Any] | None) -> None:
    """Put the entry of a shape in the table, or take out what is there."""
    if entry is None:
        entries.pop(key, None)
    else:
        entries[key] = entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["llama-7b"])
    parser.add_argument("--rows", nargs="*", type=int, default=[64])
    parser.add_argument("--beside", nargs="*", type=int, default=[])
    parser.add_argument("--groups", nargs="+", choices=sorted(GROUPS), default=["attention"])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--out", type=Path, help="default: the table of this device kind")
    args = parser.parse_args()
    out = args.out or Path("pallas_kernels/tuning") / f"{device_kind()}.json"
    table = json.loads(out.read_text()) if out.is_file() else {}
    with ThreadPoolExecutor(args.threads) as compilers:
        wanted = searches(args.models, args.rows, args.beside, args.groups)
        for search in (search for search in wanted if search.op in args.ops):
            key, entry = search_one(search, compilers)
            keep(table.setdefault(search.op, {}), key, entry)
            print(search.op, key, entry, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
