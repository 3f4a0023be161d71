"""LoRA shrink in Pallas-Triton: one program a tile, module and block of rows of A."""

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
    """How one program of the Triton kernel works; it owns one tile, module and block of ranks."""

    block_ranks: int  # rows of A
    block_chunks: int  # chunks of each row in a step of the loop
    matvec: bool  # row by row without tensor cores, for tiles of few rows
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, *, block_rows: int, num_rows: int) -> Config:
        """A reasonable choice where nothing was measured."""
        if block_rows <= 8:
            return cls(block_ranks=8, block_chunks=4, matvec=True, num_warps=4, num_stages=3)
        ranks = max(MIN_DOT, min(64, next_power_of_2(num_rows)))
        return cls(block_ranks=ranks, block_chunks=1, matvec=False, num_warps=4, num_stages=4)


class _Block(NamedTuple):
    """What one program computes: rows `ranks` of A of one module, for the rows of one tile."""

    tile: jax.Array
    place: jax.Array  # of the module, in v
    segment: Segment
    ranks: jax.Array  # [block_ranks]
    num_ranks: jax.Array  # rows of A on this device


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
    tile, place, rank_block = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when(tile < adapters.num_tiles[0])
    def _() -> None:
        segment = read_segment(adapters, tile, select_static(modules, place))
        num_ranks = jax.lax.div(segment.rank + (rank_split - 1), jnp.int32(rank_split))
        first_rank = rank_block * config.block_ranks

        @pl.when(first_rank < num_ranks)
        def _() -> None:
            ranks = first_rank + jnp.arange(config.block_ranks, dtype=jnp.int32)
            block = _Block(tile, place, segment, ranks, num_ranks)
            if config.matvec:
                _shrink_row_by_row(x_ref, adapters, v_ref, block, config.block_chunks)
            else:
                num_places = max(MIN_DOT, next_power_of_2(block_rows))
                _shrink_tile(x_ref, adapters, v_ref, block, config.block_chunks, num_places)


def _shrink_row_by_row(
    x_ref: Ref, adapters: AdapterArrays, v_ref: Ref, block: _Block, block_chunks: int
) -> None:
    """Exact work for tiles of few rows: A comes from memory once, for later rows from the cache."""
    width = x_ref.shape[1]
    row_chunks = chunks_per_row(width)
    first_chunk = block.segment.a_chunk + block.ranks * row_chunks
    is_rank = block.ranks < block.num_ranks
    shape = (block.ranks.shape[0], block_chunks, CHUNK)
    chunk_index = jnp.arange(block_chunks, dtype=jnp.int32)
    column_index = jax.lax.broadcasted_iota(jnp.int32, shape[1:], 0) * CHUNK
    column_index = column_index + jax.lax.broadcasted_iota(jnp.int32, shape[1:], 1)

    def shrink_row(row_place: jax.Array, _: jax.Array) -> jax.Array:
        row = adapters.row_order[row_place]

        def add_chunks(step: jax.Array, product: jax.Array) -> jax.Array:
            chunk = step * block_chunks + chunk_index
            column = step * (block_chunks * CHUNK) + column_index
            x = pltriton.load(
                x_ref.at[jnp.full_like(column, row), column], mask=column < width, other=0
            )
            is_real = is_rank[:, None] & (chunk < row_chunks)[None, :]
            a = read_chunks(
                adapters, block.segment.slot, first_chunk[:, None] + chunk[None, :], is_real
            )
            return product + a.astype(jnp.float32) * x.astype(jnp.float32)[None]

        num_steps = pl.cdiv(row_chunks, block_chunks)
        product = jax.lax.fori_loop(0, num_steps, add_chunks, jnp.zeros(shape, jnp.float32))
        shrunk = jnp.sum(jnp.sum(product, axis=2), axis=1)
        out = v_ref.at[
            jnp.full_like(block.ranks, row), jnp.full_like(block.ranks, block.place), block.ranks
        ]
        pltriton.store(out, shrunk, mask=is_rank)
        return _

    jax.lax.fori_loop(
        adapters.starts[block.tile], adapters.starts[block.tile + 1], shrink_row, jnp.int32(0)
    )


def _shrink_tile(
    x_ref: Ref,
    adapters: AdapterArrays,
    v_ref: Ref,
    block: _Block,
    block_chunks: int,
    num_places: int,
) -> None:
    """All rows of the tile at once on the tensor cores, one chunk of the input after the other."""
    width = x_ref.shape[1]
    row_chunks = chunks_per_row(width)
    first_chunk = block.segment.a_chunk + block.ranks * row_chunks
    is_rank = block.ranks < block.num_ranks
    rows, is_row = read_tile_rows(adapters, block.tile, num_places)
    lane = jnp.arange(CHUNK, dtype=jnp.int32)

    def add_chunks(step: jax.Array, product: jax.Array) -> jax.Array:
        for i in range(block_chunks):
            chunk = step * block_chunks + i
            column = chunk * CHUNK + lane
            x = pltriton.load(
                x_ref.at[rows[:, None], column[None, :]],
                mask=is_row[:, None] & (column < width)[None, :],
                other=0,
            )
            is_real = is_rank & (chunk < row_chunks)
            a = read_chunks(adapters, block.segment.slot, first_chunk + chunk, is_real)
            dtype = x.dtype if x.dtype == a.dtype else jnp.float32
            product = product + dot_f32(x.astype(dtype), a.astype(dtype), trans_b=True)
        return product

    num_steps = pl.cdiv(row_chunks, block_chunks)
    product = jnp.zeros((num_places, block.ranks.shape[0]), jnp.float32)
    product = jax.lax.fori_loop(0, num_steps, add_chunks, product)
    out = v_ref.at[rows[:, None], jnp.full((1, 1), block.place), block.ranks[None, :]]
    pltriton.store(out, product, mask=is_row[:, None] & is_rank[None, :])


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
        sizes = {"block_rows": block_rows, "num_rows": num_rows}
        key = shape_key(width=x.shape[1], **sizes)
        config = tuned("lora_shrink", key, Config) or Config.heuristic(**sizes)
    kernel = functools.partial(
        _kernel, config=config, modules=modules, rank_split=rank_split, block_rows=block_rows
    )
    v: jax.Array = triton_call(
        kernel,
        jax.ShapeDtypeStruct((x.shape[0], len(modules), num_rows), jnp.float32),
        name="lora_shrink",
        grid=(adapters.slots.shape[0], len(modules), pl.cdiv(num_rows, config.block_ranks)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(x, adapters)
    return v
