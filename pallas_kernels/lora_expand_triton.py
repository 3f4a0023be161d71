"""LoRA expand in Pallas-Triton: one program a tile and block of output chunks, in place."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.adapter_layout import CHUNK, chunks_per_page, chunks_per_row
from pallas_kernels.triton_blocks import (
    MIN_DOT,
    AdapterArrays,
    Ref,
    Segment,
    dot_f32,
    next_power_of_2,
    read_chunks,
    read_segment,
    read_tile_rows,
    select_static,
    triton_call,
)
from pallas_kernels.tuning_table import shape_key, tuned


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one program of the Triton kernel works; it owns one tile and a block of chunks of y."""

    block_chunks: int  # chunks of one module's output
    block_ranks: int  # rows of B in a step of the loop
    matvec: bool  # row by row without tensor cores, for tiles of few rows
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, *, block_rows: int) -> Config:
        """A reasonable choice where nothing was measured."""
        if block_rows <= 8:
            return cls(block_chunks=4, block_ranks=8, matvec=True, num_warps=4, num_stages=3)
        return cls(block_chunks=1, block_ranks=16, matvec=False, num_warps=4, num_stages=2)


class _Block(NamedTuple):
    """What one program computes: a run of columns of one module, for the rows of one tile."""

    tile: jax.Array
    place: jax.Array  # of the module, in v
    segment: Segment
    first_chunk: jax.Array  # of the module's output
    row_chunks: jax.Array  # chunks in a row of B
    width: jax.Array  # columns of the module's output
    first_column: jax.Array  # of the module's output, in y


def _kernel(
    base_ref: Ref,
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
    tile, column_block = pl.program_id(0), pl.program_id(1)

    @pl.when(tile < adapters.num_tiles[0])
    def _() -> None:
        first_blocks = _column_blocks(out_sizes, config)[0]
        place = jnp.int32(0)
        for first in first_blocks[1:]:
            place = place + (column_block >= first).astype(jnp.int32)
        segment = read_segment(adapters, tile, select_static(modules, place))

        @pl.when(segment.rank > 0)
        def _() -> None:
            first_columns = [sum(out_sizes[:i]) for i in range(len(out_sizes))]
            block = _Block(
                tile=tile,
                place=place,
                segment=segment,
                first_chunk=(column_block - select_static(first_blocks, place))
                * config.block_chunks,
                row_chunks=select_static([chunks_per_row(size) for size in out_sizes], place),
                width=select_static(out_sizes, place),
                first_column=column_offset_ref[0] + select_static(first_columns, place),
            )
            if config.matvec:
                _expand_row_by_row(base_ref, v_ref, adapters, y_ref, block, config)
            else:
                num_places = max(MIN_DOT, next_power_of_2(block_rows))
                _expand_tile(base_ref, v_ref, adapters, y_ref, block, config, num_places)


def _column_blocks(out_sizes: tuple[int, ...], config: Config) -> tuple[list[int], int]:
    """Where each module's blocks start along the grid's second axis, and how many there are."""
    counts = [pl.cdiv(chunks_per_row(size), config.block_chunks) for size in out_sizes]
    return [sum(counts[:i]) for i in range(len(counts))], sum(counts)


def _expand_row_by_row(
    base_ref: Ref,
    v_ref: Ref,
    adapters: AdapterArrays,
    y_ref: Ref,
    block: _Block,
    config: Config,
) -> None:
    """Exact work for tiles of few rows: B comes from memory once, for later rows from the cache."""
    chunk = block.first_chunk + jnp.arange(config.block_chunks, dtype=jnp.int32)
    shape = (config.block_chunks, CHUNK)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * CHUNK + block.first_chunk * CHUNK
    column = column + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    is_column = column < block.width

    def expand_row(row_place: jax.Array, _: jax.Array) -> jax.Array:
        row = adapters.row_order[row_place]

        def add_ranks(step: jax.Array, delta: jax.Array) -> jax.Array:
            rank = step * config.block_ranks + jnp.arange(config.block_ranks, dtype=jnp.int32)
            is_rank = rank < block.segment.rank
            v = pltriton.load(
                v_ref.at[jnp.full_like(rank, row), jnp.full_like(rank, block.place), rank],
                mask=is_rank,
                other=0,
            )
            b_chunk = block.segment.b_chunk + rank * block.row_chunks
            b = read_chunks(
                adapters,
                block.segment.slot,
                b_chunk[:, None] + chunk[None, :],
                is_rank[:, None] & (chunk < block.row_chunks)[None, :],
            )
            return delta + jnp.sum(v[:, None, None] * b.astype(jnp.float32), axis=0)

        num_steps = pl.cdiv(block.segment.rank, config.block_ranks)
        delta = jax.lax.fori_loop(0, num_steps, add_ranks, jnp.zeros(shape, jnp.float32))
        where = (jnp.full_like(column, row), block.first_column + column)
        base = pltriton.load(base_ref.at[where], mask=is_column, other=0)
        y = (base.astype(jnp.float32) + delta).astype(base.dtype)
        pltriton.store(y_ref.at[where], y, mask=is_column)
        return _

    jax.lax.fori_loop(
        adapters.starts[block.tile], adapters.starts[block.tile + 1], expand_row, jnp.int32(0)
    )


def _expand_tile(
    base_ref: Ref,
    v_ref: Ref,
    adapters: AdapterArrays,
    y_ref: Ref,
    block: _Block,
    config: Config,
    num_places: int,
) -> None:
    """All rows of the tile at once on the tensor cores, one chunk of columns after the other."""
    rows, is_row = read_tile_rows(adapters, block.tile, num_places)
    for i in range(config.block_chunks):
        chunk = block.first_chunk + i

        def add_ranks(step: jax.Array, delta: jax.Array, chunk: jax.Array = chunk) -> jax.Array:
            rank = step * config.block_ranks + jnp.arange(config.block_ranks, dtype=jnp.int32)
            is_rank = rank < block.segment.rank
            v = pltriton.load(
                v_ref.at[rows[:, None], jnp.full((1, 1), block.place), rank[None, :]],
                mask=is_row[:, None] & is_rank[None, :],
                other=0,
            )
            b_chunk = block.segment.b_chunk + rank * block.row_chunks + chunk
            is_real = is_rank & (chunk < block.row_chunks)
            return delta + _dot_exact(
                v, read_chunks(adapters, block.segment.slot, b_chunk, is_real)
            )

        num_steps = pl.cdiv(block.segment.rank, config.block_ranks)
        delta = jnp.zeros((num_places, CHUNK), jnp.float32)
        delta = jax.lax.fori_loop(0, num_steps, add_ranks, delta)
        column = chunk * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
        where = (rows[:, None], (block.first_column + column)[None, :])
        mask = is_row[:, None] & (column < block.width)[None, :]
        base = pltriton.load(base_ref.at[where], mask=mask, other=0)
        y = (base.astype(jnp.float32) + delta).astype(base.dtype)
        pltriton.store(y_ref.at[where], y, mask=mask)


def _dot_exact(v: jax.Array, b: jax.Array) -> jax.Array:
    """f32 `v` times `b`: for bfloat16 in two tensor-core products, so that v keeps 16 bits."""
    if b.dtype != jnp.bfloat16:
        return dot_f32(v, b.astype(jnp.float32))
    high = v.astype(jnp.bfloat16)
    low = (v - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return dot_f32(high, b) + dot_f32(low, b)


def lora_expand_triton(
    base: jax.Array,
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
    chunks_per_page(adapters.pool)  # or raises
    if config is None:
        key = shape_key(width=sum(out_sizes), num_ranks=v.shape[2], block_rows=block_rows)
        config = tuned("lora_expand", key, Config) or Config.heuristic(block_rows=block_rows)
    kernel = functools.partial(
        _kernel, config=config, modules=modules, out_sizes=out_sizes, block_rows=block_rows
    )
    num_column_blocks = _column_blocks(out_sizes, config)[1]
    y: jax.Array = triton_call(
        kernel,
        jax.ShapeDtypeStruct(base.shape, base.dtype),
        name="lora_expand",
        grid=(adapters.slots.shape[0], num_column_blocks),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        aliases={0: 0},
    )(base, v, adapters, jnp.asarray(column_offset, jnp.int32).reshape(1))
    return y
