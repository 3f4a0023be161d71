"""LoRA expand in Pallas-Triton: one program a tile and block of output chunks.

In place, or without a base: then every row has a tile, and those without an adapter get zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
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
    AdapterArrays,
    Ref,
    Rows,
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

MANY_CHUNKS = 32_768  # of y: then programs are many enough to be larger


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one program of the Triton kernel works; it owns one tile and a block of chunks of y."""

    block_chunks: int  # chunks of one module's output
    num_warps: int
    num_stages: int = 1
    row_ranks: int = 8  # for a tile of one row: rows of B in a step of the loop
    tile_ranks: int = 64  # for a tile of several rows: rows of B at once
    tile_columns: int = 64  # and columns at once, up to a chunk

    @classmethod
    def heuristic(cls, *, num_tokens: int, block_rows: int, width: int) -> Config:
        """A reasonable choice where nothing was measured: work for every multiprocessor."""
        num_chunks = num_tokens * chunks_per_row(width)
        if block_rows > 1:
            chunks = 4 if num_chunks >= MANY_CHUNKS else 2
            return cls(block_chunks=chunks, num_warps=4, row_ranks=16)
        chunks = min(8, next_power_of_2(-(-num_chunks // NUM_PROGRAMS)))
        ranks, warps = {1: (64, 2), 2: (16, 1), 4: (16, 2), 8: (4, 4)}[chunks]
        return cls(block_chunks=chunks, num_warps=warps, row_ranks=ranks)


class Block(NamedTuple):
    """What one program computes: a run of columns of one module, for the rows of one tile."""

    tile: jax.Array
    place: jax.Array  # of the module, in v
    segment: Segment
    first_chunk: jax.Array  # of the module's output
    row_chunks: jax.Array  # chunks in a row of B
    max_row_chunks: int  # of any of the modules
    width: jax.Array  # columns of the module's output
    first_column: jax.Array  # of the module's output, in y


def _kernel(
    base_ref: Ref | None,
    v_ref: Ref,
    adapters: AdapterArrays,
    column_offset_ref: Ref,
    y_ref: Ref,
    *,
    config: Config,
    modules: tuple[int, ...],
    out_sizes: tuple[int, ...],
    block_rows: int,
) -> None:
    place, first_chunk = find_columns(pl.program_id(0), out_sizes, config.block_chunks)
    # says so that columns start at multiples of it, which lets whole vectors be loaded
    align = math.gcd(CHUNK, y_ref.shape[1], *out_sizes)
    offset = jax.lax.div(column_offset_ref[0], jnp.int32(align)) * align
    first_column = offset + select_static(starts_of(out_sizes), place)

    def expand(tile: jax.Array) -> None:
        segment = read_segment(adapters, tile, select_static(modules, place))
        # without a base a tile of no adapter writes zeros to the row that stands in its place
        has_work = segment.rank > 0 if base_ref is not None else tile < y_ref.shape[0]

        @pl.when(has_work)
        def _() -> None:
            block = make_block(tile, place, segment, first_chunk, first_column, out_sizes)
            exact = is_exact(out_sizes, config.block_chunks)
            if block_rows == 1:
                _expand_row(tile, base_ref, v_ref, adapters, y_ref, block, config, exact)
                return
            start = adapters.starts[tile]
            num_tile_rows = adapters.starts[tile + 1] - start

            @pl.when(num_tile_rows == 1)
            def _() -> None:
                _expand_row(start, base_ref, v_ref, adapters, y_ref, block, config, exact)

            @pl.when(num_tile_rows > 1)
            def _() -> None:
                num_places = max(MIN_DOT, next_power_of_2(block_rows))
                _expand_tile(base_ref, v_ref, adapters, y_ref, block, config, num_places)

    for_each_tile(adapters, expand, block_rows=block_rows, axis=1)


def column_blocks(out_sizes: tuple[int, ...], block_chunks: int) -> tuple[list[int], int]:
    """Where each module's blocks start along the grid's first axis, and how many there are."""
    counts = [pl.cdiv(chunks_per_row(size), block_chunks) for size in out_sizes]
    return starts_of(counts), sum(counts)


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Where each begins, one after the other."""
    return [sum(sizes[:i]) for i in range(len(sizes))]


def find_columns(
    column_block: jax.Array, out_sizes: tuple[int, ...], block_chunks: int
) -> tuple[jax.Array, jax.Array]:
    """Which module a block of columns is of, by its place among them, and its first chunk there."""
    first_blocks = column_blocks(out_sizes, block_chunks)[0]
    place = jnp.int32(0)
    for first in first_blocks[1:]:
        place = place + (column_block >= first).astype(jnp.int32)
    return place, (column_block - select_static(first_blocks, place)) * block_chunks


def make_block(
    tile: jax.Array,
    place: jax.Array,
    segment: Segment,
    first_chunk: jax.Array,
    first_column: jax.Array,
    out_sizes: tuple[int, ...],
) -> Block:
    """The block of a tile that begins at a chunk of the module at `place`."""
    row_chunks = [chunks_per_row(size) for size in out_sizes]
    return Block(
        tile=tile,
        place=place,
        segment=segment,
        first_chunk=first_chunk,
        row_chunks=select_static(row_chunks, place),
        max_row_chunks=max(row_chunks),
        width=select_static(out_sizes, place),
        first_column=first_column,
    )


def is_exact(out_sizes: tuple[int, ...], block_chunks: int) -> bool:
    """Whether every block is full, so that nothing of it need be masked."""
    return all(size % (block_chunks * CHUNK) == 0 for size in out_sizes)


def block_columns(
    block: Block, row: jax.Array, block_chunks: int, exact: bool
) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
    """Where a row's columns of a block lie in y, `[block_chunks, 128]`, and which are real."""
    shape = (block_chunks, CHUNK)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * CHUNK + block.first_chunk * CHUNK
    column = column + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    where = (jnp.full_like(column, row), block.first_column + column)
    return where, None if exact else column < block.width


def read_block(
    adapters: AdapterArrays,
    block: Block,
    step: jax.Array,
    is_rank: jax.Array,
    block_chunks: int,
    exact: bool,
) -> jax.Array:
    """The block's columns of the rows of B of a step of the loop, `is_rank [n]` of them real:
    `[n, block_chunks, 128]`.
    """
    rows = _find_rows(adapters, block, block.first_chunk, step, num_rows=is_rank.shape[0])
    index = jnp.arange(block_chunks, dtype=jnp.int32)
    is_real = is_rank[:, None]
    if not exact:
        is_real = is_real & (index < block.row_chunks - block.first_chunk)[None, :]
    return read_rows(adapters, rows, index, is_real)


def _expand_row(
    row_place: jax.Array,
    base_ref: Ref | None,
    v_ref: Ref,
    adapters: AdapterArrays,
    y_ref: Ref,
    block: Block,
    config: Config,
    exact: bool,
) -> None:
    """The tile's one row: rows of B stream past its columns."""
    row = adapters.row_order[row_place]
    where, is_column = block_columns(block, row, config.block_chunks, exact)
    other = None if exact else 0
    base = None
    if base_ref is not None:
        base = pltriton.load(base_ref.at[where], mask=is_column, other=other)

    def add_ranks(step: jax.Array, delta: jax.Array) -> jax.Array:
        rank = step * config.row_ranks + jnp.arange(config.row_ranks, dtype=jnp.int32)
        is_rank = rank < block.segment.rank
        b = read_block(adapters, block, step, is_rank, config.block_chunks, exact)
        v = _load_v(v_ref, jnp.full_like(rank, row), jnp.bool_(True), block, rank)
        return delta + jnp.sum(v[:, None, None] * b.astype(jnp.float32), axis=0)

    shape = (config.block_chunks, CHUNK)
    num_steps = pl.cdiv(block.segment.rank, config.row_ranks)
    delta = jax.lax.fori_loop(0, num_steps, add_ranks, jnp.zeros(shape, jnp.float32))
    if base is not None:
        delta = (base.astype(jnp.float32) + delta).astype(base.dtype)
    pltriton.store(y_ref.at[where], delta, mask=is_column)


def _load_v(
    v_ref: Ref, row: jax.Array, is_row: jax.Array, block: Block, rank: jax.Array
) -> jax.Array:
    """v of some rows and ranks, zeros where there is none.

    What v holds past the rank is undefined, and set to zero after the load: masks that differ
    within a vector would make it load each element by itself.
    """
    shape = jnp.broadcast_shapes(row.shape, rank.shape)
    where = (row, jnp.full((1,) * len(shape), block.place), rank)
    mask = jnp.broadcast_to(is_row & (rank < v_ref.shape[2]), shape)
    v = pltriton.load(v_ref.at[where], mask=mask, other=0)
    return jnp.where(rank < block.segment.rank, v, 0.0)


def _find_rows(
    adapters: AdapterArrays, block: Block, chunk: jax.Array, step: jax.Array, *, num_rows: int
) -> Rows:
    """Rows of B of one step of the loop, from their chunk `chunk` on."""
    first_chunk = block.segment.b_chunk + step * num_rows * block.row_chunks + chunk
    return find_rows(
        adapters,
        block.segment.slot,
        first_chunk,
        block.row_chunks,
        num_rows=num_rows,
        max_row_chunks=block.max_row_chunks,
    )


def _expand_tile(
    base_ref: Ref,
    v_ref: Ref,
    adapters: AdapterArrays,
    y_ref: Ref,
    block: Block,
    config: Config,
    num_places: int,
) -> None:
    """All rows of the tile at once on the tensor cores, piece by piece of the block's columns.

    What a piece needs is loaded while the piece before it is multiplied.
    """
    rows, is_row = read_tile_rows(adapters, block.tile, num_places)
    width = config.tile_columns
    pieces_per_chunk = CHUNK // width
    num_pieces = config.block_chunks * pieces_per_chunk
    first_piece = block.first_chunk * pieces_per_chunk
    num_steps = -(-v_ref.shape[2] // config.tile_ranks)  # most often 1

    def load_v(step: jax.Array) -> jax.Array:
        rank = step * config.tile_ranks + jnp.arange(config.tile_ranks, dtype=jnp.int32)
        return _load_v(v_ref, rows[:, None], is_row[:, None], block, rank[None, :])

    def load_b(piece: jax.Array, step: jax.Array) -> jax.Array:
        rank = step * config.tile_ranks + jnp.arange(config.tile_ranks, dtype=jnp.int32)
        piece = first_piece + piece
        chunk = jax.lax.div(piece, jnp.int32(pieces_per_chunk))
        lane = jax.lax.rem(piece, jnp.int32(pieces_per_chunk)) * width
        is_real = (rank < block.segment.rank) & (chunk < block.row_chunks)
        b_rows = _find_rows(adapters, block, chunk, step, num_rows=config.tile_ranks)
        lane = lane + jnp.arange(width, dtype=jnp.int32)
        return read_rows(adapters, b_rows, jnp.int32(0), is_real, lane)

    def place(piece: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        column = (first_piece + piece) * width + jnp.arange(width, dtype=jnp.int32)
        mask = is_row[:, None] & (column < block.width)[None, :]
        return (rows[:, None], (block.first_column + column)[None, :]), mask

    def load(piece: jax.Array) -> tuple[jax.Array, jax.Array]:
        where, mask = place(piece)
        base = pltriton.load(base_ref.at[where], mask=mask, other=0)
        return base, load_b(piece, jnp.int32(0))

    v = load_v(jnp.int32(0))

    def expand_piece(
        piece: jax.Array, loaded: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        base, b = loaded
        following = load(jnp.minimum(piece + 1, num_pieces - 1))
        delta = _dot_exact(v, b)
        if num_steps > 1:

            def add_ranks(step: jax.Array, delta: jax.Array) -> jax.Array:
                return delta + _dot_exact(load_v(step), load_b(piece, step))

            stop = pl.cdiv(block.segment.rank, config.tile_ranks)
            delta = jax.lax.fori_loop(1, stop, add_ranks, delta)
        where, mask = place(piece)
        y = (base.astype(jnp.float32) + delta).astype(base.dtype)
        pltriton.store(y_ref.at[where], y, mask=mask)
        return following

    jax.lax.fori_loop(0, num_pieces, expand_piece, load(jnp.int32(0)))


def _dot_exact(v: jax.Array, b: jax.Array) -> jax.Array:
    """f32 `v` times `b`: for bfloat16 in two tensor-core products, so that v keeps 16 bits."""
    if b.dtype != jnp.bfloat16:
        return dot_f32(v, b.astype(jnp.float32))
    high = v.astype(jnp.bfloat16)
    low = (v - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return dot_f32(high, b) + dot_f32(low, b)


def find_config(
    tiles: AdapterArrays | LoraTiles, *, block_rows: int, width: int, num_ranks: int
) -> tuple[str, Config]:
    """The key of a shape in the tuning table, and the configuration for it."""
    sizes = {"num_tokens": tiles.row_order.shape[0], "block_rows": block_rows, "width": width}
    key = shape_key(num_ranks=num_ranks, **sizes)
    return key, tuned("lora_expand", key, Config) or Config.heuristic(**sizes)


def lora_expand_triton(
    base: jax.Array | None,
    v: jax.Array,
    adapters: AdapterArrays,
    column_offset: jax.Array,
    *,
    modules: tuple[int, ...],
    out_sizes: tuple[int, ...],
    block_rows: int,
    config: Config | None,
    interpret: bool,
) -> jax.Array:
    """`lora_expand` in Pallas-Triton."""
    page_chunks = chunks_per_page(adapters.pool)
    if config is None:
        _, config = find_config(
            adapters, block_rows=block_rows, width=sum(out_sizes), num_ranks=v.shape[2]
        )
    widest = max(map(chunks_per_row, out_sizes))
    block_chunks = fitting_chunks(config.block_chunks, widest, page_chunks)
    config = dataclasses.replace(config, block_chunks=block_chunks)
    kernel = functools.partial(
        _kernel, config=config, modules=modules, out_sizes=out_sizes, block_rows=block_rows
    )
    num_column_blocks = column_blocks(out_sizes, block_chunks)[1]
    out = jax.ShapeDtypeStruct((v.shape[0], sum(out_sizes)), jnp.float32)
    if base is not None:
        out = jax.ShapeDtypeStruct(base.shape, base.dtype)
    y: jax.Array = triton_call(
        kernel,
        out,
        name="lora_expand",
        grid=(num_column_blocks, num_tile_programs(adapters, block_rows)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        aliases={} if base is None else {0: 0},
    )(base, v, adapters, jnp.asarray(column_offset, jnp.int32).reshape(1))
    return y
