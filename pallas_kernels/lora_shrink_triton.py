"""LoRA shrink in Pallas-Triton: one program a tile, module and share of the rows of A.

Of tiles of several rows, the input's columns may be dealt out too: few tiles are as slow as the one
loop over them, which waits for every chunk. The parts' sums are added by XLA.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.adapter_layout import CHUNK, chunks_per_page, chunks_per_row
from pallas_kernels.tiles import LoraTiles
from pallas_kernels.triton_blocks import (
    MIN_DOT,
    NUM_PROGRAMS,
    NUM_TILE_PROGRAMS,
    AdapterArrays,
    Ref,
    Segment,
    dot_f32,
    find_rows,
    fitting_chunks,
    for_each_tile,
    next_power_of_2,
    num_tile_programs,
    read_rows,
    read_segment,
    read_tile_rows,
    select_static,
    triton_call,
)
from pallas_kernels.tuning_table import shape_key, tuned

WIDE = 8192  # columns; x and some rows of A in registers leave room for no more


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one program of the Triton kernel works; it owns a tile, a module and a share of A."""

    num_shares: int  # programs that divide the rows of a module's A evenly
    num_warps: int
    num_stages: int = 1
    row_ranks: int = 4  # for a tile of one row: rows of A in a step, the least that a share has
    row_chunks: int = 32  # and chunks of each that are loaded at once
    tile_ranks: int = 16  # for a tile of several rows: rows of A at once
    tile_chunks: int = 1  # and chunks of each in a step
    num_parts: int = 1  # programs that divide the chunks of a row

    @classmethod
    def heuristic(
        cls, *, num_tokens: int, num_modules: int, block_rows: int, num_rows: int, width: int
    ) -> Config:
        """A reasonable choice where nothing was measured: work for every multiprocessor."""
        if block_rows == 1:
            wanted = max(1, NUM_PROGRAMS // (num_tokens * num_modules))
            row_ranks = 4 if width <= WIDE else 2
            most = -(-num_rows // row_ranks)
            shares = min(16, max(4, 1 << (wanted.bit_length() - 1)), most)
            return cls(num_shares=shares, num_warps=8, row_ranks=row_ranks)
        num_tiles = -(-num_tokens // block_rows) * num_modules
        shares = min(4, 1 << (max(1, NUM_TILE_PROGRAMS // num_tiles).bit_length() - 1))
        ranks = max(MIN_DOT, min(64 // shares, next_power_of_2(num_rows)))
        # few tokens are most often single rows, which want several programs a multiprocessor
        chunks = 2 if num_tokens >= 1024 else 1
        stages = {16: 5, 32: 4, 64: 3}[ranks]  # as many as fit shared memory
        return cls(
            num_shares=shares, num_warps=4, num_stages=stages, row_ranks=2, tile_ranks=ranks,
            tile_chunks=chunks,
        )  # fmt: skip


class _Share(NamedTuple):
    """What one program computes of one tile: rows `[first, stop)` of A of one module."""

    part: jax.Array  # of the input's chunks
    tile: jax.Array
    place: jax.Array  # of the module, in v
    segment: Segment
    first: jax.Array
    stop: jax.Array


def _kernel(
    x_ref: Ref,
    adapters: AdapterArrays,
    v_ref: Ref,
    *,
    config: Config,
    modules: tuple[int, ...],
    rank_split: int,
    block_rows: int,
) -> None:
    share, place = pl.program_id(0), pl.program_id(1)
    part = jax.lax.rem(share, jnp.int32(config.num_parts))
    share = jax.lax.div(share, jnp.int32(config.num_parts))

    def shrink(tile: jax.Array) -> None:
        # of a tile that is sure to be a row, x is on its way while the segment is
        x_row = load_row(x_ref, adapters, tile, config.row_chunks) if block_rows == 1 else None
        segment = read_segment(adapters, tile, select_static(modules, place))
        num_ranks = jax.lax.div(segment.rank + (rank_split - 1), jnp.int32(rank_split))
        share_ranks = jnp.maximum(pl.cdiv(num_ranks, config.num_shares), config.row_ranks)
        first = share * share_ranks
        stop = jnp.minimum(first + share_ranks, num_ranks)
        block = _Share(part, tile, place, segment, first, stop)

        @pl.when(first < stop)
        def _() -> None:
            if x_row is not None:
                _shrink_row(x_row, adapters, v_ref, block, config, x_ref.shape[1])
                return
            start = adapters.starts[tile]
            num_tile_rows = adapters.starts[tile + 1] - start

            @pl.when((num_tile_rows == 1) & (part == 0))
            def _() -> None:
                x_row = load_row(x_ref, adapters, start, config.row_chunks)
                _shrink_row(x_row, adapters, v_ref, block, config, x_ref.shape[1])

            @pl.when((num_tile_rows == 1) & (part > 0))
            def _() -> None:
                _leave_nothing(v_ref, block, adapters.row_order[start])

            @pl.when(num_tile_rows > 1)
            def _() -> None:
                num_places = max(MIN_DOT, next_power_of_2(block_rows))
                _shrink_tile(x_ref, adapters, v_ref, block, config, num_places)

    for_each_tile(adapters, shrink, block_rows=block_rows, axis=2)


class Row(NamedTuple):
    """A tile's one row of x, in blocks of chunks."""

    row: jax.Array
    blocks: list[jax.Array]  # [block_chunks, 128]


def load_row(x_ref: Ref, adapters: AdapterArrays, row_place: jax.Array, most_chunks: int) -> Row:
    """The row at a place of the order, in blocks of at most so many chunks."""
    width = x_ref.shape[1]
    row_chunks = chunks_per_row(width)
    block_chunks = fitting_chunks(most_chunks, row_chunks, chunks_per_page(adapters.pool))
    row = adapters.row_order[row_place]
    column = jax.lax.broadcasted_iota(jnp.int32, (block_chunks, CHUNK), 0) * CHUNK
    column = column + jax.lax.broadcasted_iota(jnp.int32, (block_chunks, CHUNK), 1)
    blocks = []
    for start in range(0, row_chunks, block_chunks):
        mask = None
        if (start + block_chunks) * CHUNK > width:
            mask = start * CHUNK + column < width
        index = (jnp.full_like(column, row), start * CHUNK + column)
        x = pltriton.load(x_ref.at[index], mask=mask, other=None if mask is None else 0)
        blocks.append(x)
    return Row(row, blocks)


def rank_products(
    x_row: Row,
    adapters: AdapterArrays,
    segment: Segment,
    first_rank: jax.Array,
    is_rank: jax.Array,
    width: int,
) -> jax.Array:
    """Products of a row of x and rows `first_rank, ...` of its A, `is_rank [n]` of them real:
    f32 `[n, columns]`, whose sums over the columns are v.
    """
    row_chunks, block_chunks = chunks_per_row(width), x_row.blocks[0].shape[0]
    num_ranks = is_rank.shape[0]
    first_chunk = segment.a_chunk + first_rank * row_chunks
    index = jnp.arange(block_chunks, dtype=jnp.int32)
    product = None
    for start, x in zip(range(0, row_chunks, block_chunks), x_row.blocks, strict=True):
        rows = find_rows(
            adapters,
            segment.slot,
            first_chunk + start,
            row_chunks,
            num_rows=num_ranks,
            max_row_chunks=row_chunks,
        )
        is_real = is_rank[:, None]
        if start + block_chunks > row_chunks:
            is_real = is_real & (index < row_chunks - start)[None, :]
        a = read_rows(adapters, rows, index, is_real)
        part = a.astype(jnp.float32) * x.astype(jnp.float32)[None]
        product = part if product is None else product + part
    assert product is not None
    return product.reshape(num_ranks, block_chunks * CHUNK)


def _shrink_row(
    x_row: Row, adapters: AdapterArrays, v_ref: Ref, share: _Share, config: Config, width: int
) -> None:
    """The tile's one row: x stays in registers, rows of A stream past it."""

    def shrink_ranks(step: jax.Array, _: jax.Array) -> jax.Array:
        first_rank = share.first + step * config.row_ranks
        rank = first_rank + jnp.arange(config.row_ranks, dtype=jnp.int32)
        is_rank = rank < share.stop
        products = rank_products(x_row, adapters, share.segment, first_rank, is_rank, width)
        out = _row_of_v(v_ref, share, x_row.row, rank)
        pltriton.store(out, jnp.sum(products, axis=1), mask=is_rank)
        return _

    num_steps = pl.cdiv(share.stop - share.first, config.row_ranks)
    jax.lax.fori_loop(0, num_steps, shrink_ranks, jnp.int32(0))


def _leave_nothing(v_ref: Ref, share: _Share, row: jax.Array) -> None:
    """Zeros in place of a part that another program computes whole."""
    rank = jnp.arange(next_power_of_2(v_ref.shape[3]), dtype=jnp.int32)
    nothing = jnp.zeros(rank.shape, jnp.float32)
    is_mine = (rank >= share.first) & (rank < share.stop)
    pltriton.store(_row_of_v(v_ref, share, row, rank), nothing, mask=is_mine)


def _row_of_v(v_ref: Ref, share: _Share, row: jax.Array, rank: jax.Array) -> Ref:
    """Where a row's `rank [n]` of the program's part and module are."""
    where = (share.part, row, share.place)
    return v_ref.at[(*(jnp.full_like(rank, index) for index in where), rank)]


def _shrink_tile(
    x_ref: Ref,
    adapters: AdapterArrays,
    v_ref: Ref,
    share: _Share,
    config: Config,
    num_places: int,
) -> None:
    """All rows of the tile at once on the tensor cores, one chunk of the input after the other."""
    width = x_ref.shape[1]
    row_chunks, page_chunks = chunks_per_row(width), chunks_per_page(adapters.pool)
    rows, is_row = read_tile_rows(adapters, share.tile, num_places)
    lane = jnp.arange(CHUNK, dtype=jnp.int32)
    slot = share.segment.slot

    find = functools.partial(
        find_rows,
        row_chunks=row_chunks,
        num_rows=config.tile_ranks,
        max_row_chunks=row_chunks,
    )
    is_whole = row_chunks <= page_chunks  # then a row is found once for all its chunks
    chunk_steps = -(-row_chunks // (config.tile_chunks * config.num_parts))  # of a part

    def shrink_ranks(rank_step: jax.Array, _: jax.Array) -> jax.Array:
        first_rank = share.first + rank_step * config.tile_ranks
        rank = first_rank + jnp.arange(config.tile_ranks, dtype=jnp.int32)
        is_rank = rank < share.stop
        first_chunk = share.segment.a_chunk + first_rank * row_chunks
        whole_rows = find(adapters, slot, first_chunk) if is_whole else None

        def add_chunks(step: jax.Array, product: jax.Array) -> jax.Array:
            for i in range(config.tile_chunks):
                chunk = (share.part * chunk_steps + step) * config.tile_chunks + i
                column = chunk * CHUNK + lane
                x = pltriton.load(
                    x_ref.at[rows[:, None], column[None, :]],
                    mask=is_row[:, None] & (column < width)[None, :],
                    other=0,
                )
                a_rows, at = whole_rows, chunk
                if a_rows is None:
                    a_rows, at = find(adapters, slot, first_chunk + chunk), jnp.int32(0)
                a = read_rows(adapters, a_rows, at, is_rank & (chunk < row_chunks))
                dtype = x.dtype if x.dtype == a.dtype else jnp.float32
                product = product + dot_f32(x.astype(dtype), a.astype(dtype), trans_b=True)
            return product

        product = jnp.zeros((num_places, config.tile_ranks), jnp.float32)
        product = jax.lax.fori_loop(0, chunk_steps, add_chunks, product)
        part, place = jnp.full((1, 1), share.part), jnp.full((1, 1), share.place)
        out = v_ref.at[part, rows[:, None], place, rank[None, :]]
        pltriton.store(out, product, mask=is_row[:, None] & is_rank[None, :])
        return _

    num_steps = pl.cdiv(share.stop - share.first, config.tile_ranks)
    jax.lax.fori_loop(0, num_steps, shrink_ranks, jnp.int32(0))


def find_config(
    tiles: AdapterArrays | LoraTiles,
    *,
    block_rows: int,
    width: int,
    num_modules: int,
    num_rows: int,
) -> tuple[str, Config]:
    """The key of a shape in the tuning table, and the configuration for it."""
    sizes = {
        "num_tokens": tiles.row_order.shape[0],
        "num_modules": num_modules,
        "block_rows": block_rows,
        "num_rows": num_rows,
        "width": width,
    }
    key = shape_key(**sizes)
    return key, tuned("lora_shrink", key, Config) or Config.heuristic(**sizes)


def lora_shrink_triton(
    x: jax.Array,
    adapters: AdapterArrays,
    *,
    modules: tuple[int, ...],
    num_rows: int,
    rank_split: int,
    block_rows: int,
    config: Config | None,
    interpret: bool,
) -> jax.Array:
    """`lora_shrink` in Pallas-Triton."""
    chunks_per_page(adapters.pool)  # or raises
    if config is None:
        _, config = find_config(
            adapters,
            block_rows=block_rows,
            width=x.shape[1],
            num_modules=len(modules),
            num_rows=num_rows,
        )
    num_parts = config.num_parts if block_rows > 1 else 1
    config = dataclasses.replace(config, num_parts=num_parts)
    shape = (num_parts, adapters.row_order.shape[0], len(modules), num_rows)
    parts: jax.Array = triton_call(
        functools.partial(
            _kernel, config=config, modules=modules, rank_split=rank_split, block_rows=block_rows
        ),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        name="lora_shrink",
        grid=(
            config.num_shares * num_parts,
            len(modules),
            num_tile_programs(adapters, block_rows),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(x, adapters)
    return parts[0] if num_parts == 1 else jnp.sum(parts, axis=0)
