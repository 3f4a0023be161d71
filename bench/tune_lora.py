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
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernel_timing import time_compiled_chain
from bench.kernels_lora import GROUPS, make_world, step_tiles
from bench.lora_inputs import common_tables, fill_pool
from bench.lora_searches import OPS, TWO_KERNELS, Config, Search, searches
from pallas_kernels.shapes import MODELS
from pallas_kernels.tuning_table import device_kind

DECODE_RANKS = ("8", "64")
PREFILL_RANKS = ("16", "64")


def layers(search: Search, config: Any) -> Any:
    """Many layers, one after the other: `(y, x, v, pool, slot_pages, tiles) -> y`."""
    one_layer = jax.jit(search.layer(config))

    def run(y: Any, x: Any, v: Any, pool: Any, slot_pages: Any, tiles: Any) -> Any:
        for i in range(search.case.num_layers):
            y = one_layer(y, x, v, (pool, slot_pages, jnp.int32(i), tiles))
        return y

    return run


def search_one(search: Search, compilers: ThreadPoolExecutor) -> tuple[str, dict[str, Any] | None]:
    """The key of a shape and its best entry; none where two kernels are faster than one."""
    ranks = DECODE_RANKS if search.case.is_decode or search.is_beside else PREFILL_RANKS
    cases = [dataclasses.replace(search.case, rank=rank) for rank in ranks]
    worlds = [make_world(case) for case in cases]
    num_pages, tables = common_tables(worlds)
    page_elems = search.case.shape.page_elems
    tiles = [step_tiles(case, world) for case, world in zip(cases, worlds, strict=True)]
    key = search.key(tiles[0])
    pool_shape = jax.ShapeDtypeStruct((num_pages, page_elems), jnp.bfloat16)
    shapes = (*jax.eval_shape(search.rows), pool_shape, tables[0], tiles[0])

    def compiled(config: Config) -> Any:
        return jax.jit(layers(search, config), donate_argnums=0).lower(*shapes).compile()

    tried = list(search.candidates())
    programs = list(compilers.map(compiled, tried))  # all of them, before anything is timed
    pool = fill_pool(num_pages, page_elems)
    times: list[tuple[float, Config, list[float]]] = []
    for config, program in zip(tried, programs, strict=True):
        us = []
        for table, cut in zip(tables, tiles, strict=True):
            y, x, v = search.rows()
            arguments = (x, v, pool, jnp.asarray(table), cut)
            seconds = time_compiled_chain(program, y, arguments, search.case.num_layers)
            us.append(round(seconds * 1e6, 2))
        times.append((math.prod(us), config, us))
    _, best, us = min(times, key=lambda found: found[0])
    for _, config, two_us in times:
        if config is TWO_KERNELS:
            print(search.op, key, f"two kernels {two_us} us, best {us} us", flush=True)
    if best is TWO_KERNELS:
        return key, None
    return key, {"config": dataclasses.asdict(best), "us": dict(zip(ranks, us, strict=True))}


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
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
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
