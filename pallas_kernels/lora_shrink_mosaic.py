"""LoRA shrink in Pallas Mosaic GPU (Hopper), for tiles of few rows: as fast as A can be read.

A block owns some ranks of one tile and module. Rows of A are copied by TMA into a ring in shared
memory, four at once, and multiplied on the CUDA cores, a warp each: no warp waits for another to
add up a product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array

from pallas_kernels.adapter_layout import CHUNK, chunks_per_page
from pallas_kernels.mosaic_blocks import (
    MAX_BARRIERS,
    ChunkCopy,
    Ref,
    interpret_params,
    plgpu,
    whole_chunks,
)
from pallas_kernels.triton_blocks import AdapterArrays, Segment, read_segment, select_static

ROWS_AT_ONCE = 4  # rows of a tile that share a pass over A
QUAD = 4  # rows of A that are multiplied at once, one by each warp
STEP_CHUNKS = 8  # chunks whose products are held in registers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one block works."""

    block_ranks: int  # rows of A that a block owns, a multiple of 4
    block_chunks: int  # chunks of a row in a copy, at most
    ring_bytes: int  # rows of A on their way to a block

    @classmethod
    def heuristic(cls, *, num_runs: int) -> Config:
        """What was best on an H200 for so many tiles times modules."""
        block_ranks = 8 if num_runs >= 128 else 4
        return cls(block_ranks=block_ranks, block_chunks=32, ring_bytes=block_ranks * 8192)


@dataclasses.dataclass(frozen=True, slots=True)
class _Pieces:
    """A row of A in pieces of one size; the last begins early rather than end late. In chunks."""

    row_chunks: int
    count: int
    size: int
    step: int  # divides the size: chunks whose products are held in registers

    @classmethod
    def of(cls, row_chunks: int, block_chunks: int) -> _Pieces:
        count = pl.cdiv(row_chunks, block_chunks)
        if count == 1:
            steps = range(1, min(row_chunks, STEP_CHUNKS) + 1)
            return cls(row_chunks, 1, row_chunks, max(s for s in steps if row_chunks % s == 0))
        step = min(STEP_CHUNKS, block_chunks)
        return cls(row_chunks, count, pl.cdiv(row_chunks, count * step) * step, step)

    def start(self, piece: jax.Array) -> jax.Array:
        return jnp.minimum(piece * self.size, self.row_chunks - self.size)


def _layout() -> Any:
    """Of `[4, chunks, 128]`: a row of A in each warp, a chunk over its lanes."""
    tiling = fragmented_array.Tiling(((QUAD, 1, CHUNK), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a block knows of its work; i32 scalars but for the last three."""

    place: jax.Array  # of the module
    segment: Segment
    first_rank: jax.Array
    count: jax.Array  # ranks
    last: jax.Array  # place of the tile's last row
    pieces: _Pieces
    num_slots: int  # of the ring, each a piece of four rows
    page_chunks: int


def _kernel(
    x_ref: Ref,  # [T, row_chunks, 128]
    *refs: Ref,
    config: Config,
    pieces: _Pieces,
    page_chunks: int,
    num_slots: int,
    modules: tuple[int, ...],
    rank_split: int,
    block_rows: int,
) -> None:
    adapters, (v_ref, *memory) = AdapterArrays(*refs[:8]), refs[8:]
    tile, place = jax.lax.axis_index("tile"), jax.lax.axis_index("module")
    first_rank = jax.lax.axis_index("rank") * config.block_ranks
    # what is read first waits for nothing: a padding tile has slot 0, which has no modules
    segment = read_segment(adapters, tile, select_static(modules, place))
    tile_start, tile_stop = adapters.starts[tile], adapters.starts[tile + 1]
    num_ranks = jax.lax.div(segment.rank + (rank_split - 1), jnp.int32(rank_split))
    count = jnp.minimum(num_ranks - first_rank, config.block_ranks)

    @pl.when(count > 0)
    def shrink_tile() -> None:
        work = _Work(
            place, segment, first_rank, count, tile_stop - 1, pieces, num_slots, page_chunks
        )

        def shrink_rows(group: jax.Array, _: None) -> None:
            first = tile_start + group * ROWS_AT_ONCE
            shrink = functools.partial(_shrink_rows, work, first, x_ref, adapters, v_ref, memory)
            pl.when(tile_stop - first == 1)(functools.partial(shrink, 1))
            if block_rows > 1:
                pl.when(tile_stop - first > 1)(functools.partial(shrink, ROWS_AT_ONCE))

        jax.lax.fori_loop(0, pl.cdiv(tile_stop - tile_start, ROWS_AT_ONCE), shrink_rows, None)


def _shrink_rows(
    work: _Work, start: jax.Array, x_ref: Ref, adapters: AdapterArrays, v_ref: Ref,
    memory: list[Ref], several: int,
) -> None:  # fmt: skip
    """Shrink the rows `row_order[start : start + several]`, as far as the tile has them."""
    a_smem, whole, single = memory
    pieces, num_slots = work.pieces, jnp.int32(work.num_slots)
    num_units = pl.cdiv(work.count, QUAD) * pieces.count  # a unit: a piece of four rows of A
    copy = ChunkCopy(
        adapters, work.segment.slot, work.page_chunks, pieces.size, whole, single, pieces.size
    )
    places = [start + i for i in range(several)]
    rows = [adapters.row_order[jnp.minimum(place, work.last)] for place in places]
    layout = _layout()

    def for_each_row(unit: jax.Array, do: Callable[[jax.Array, jax.Array], None]) -> None:
        """`do(chunk, ring)` for the rows of A in a unit."""
        quad = jax.lax.div(unit, jnp.int32(pieces.count))
        rank, ring = quad * QUAD, jax.lax.rem(unit, num_slots) * QUAD
        chunk = work.segment.a_chunk + (work.first_rank + rank) * pieces.row_chunks
        chunk = chunk + pieces.start(unit - quad * pieces.count)

        def one(i: jax.Array, _: None) -> None:
            do(chunk + i * pieces.row_chunks, ring + i)

        jax.lax.fori_loop(0, jnp.minimum(QUAD, work.count - rank), one, None)

    def start_unit(unit: jax.Array, _: None = None) -> None:
        for_each_row(unit, lambda chunk, ring: copy.start(chunk, a_smem, ring))

    def read_x(row: jax.Array, chunk: jax.Array) -> jax.Array:
        x = x_ref.at[row, pl.ds(chunk, pieces.step)]
        x_step: jax.Array = plgpu.load(x, layout=layout.reduce(0), optimized=False)
        return x_step

    def product(ring: jax.Array, first: jax.Array | int, x: jax.Array, first_new: Any) -> jax.Array:
        a_step = a_smem.at[pl.ds(ring, QUAD), pl.ds(first, pieces.step)]
        a = plgpu.load(a_step, layout=layout, optimized=False).astype(jnp.float32)
        if pieces.row_chunks % pieces.size:  # chunks that the piece before had too
            chunk = plgpu.broadcasted_iota(jnp.int32, a.shape, 1, layout=layout)
            a = jnp.where(chunk >= first_new - first, a, 0.0)
        x = jax.lax.broadcast_in_dim(x.astype(jnp.float32), a.shape, [1, 2])
        return jnp.sum(a * x, axis=1)

    def add_piece(piece: jax.Array, carry: Any) -> Any:
        quad, sums = carry
        unit = quad * pieces.count + piece
        ring, chunk = jax.lax.rem(unit, num_slots) * QUAD, pieces.start(piece)
        first_new = piece * pieces.size - chunk
        if several == 1:  # x comes from memory while A does
            firsts = range(0, pieces.size, pieces.step)
            x_steps = [read_x(rows[0], chunk + first) for first in firsts]
            for_each_row(unit, copy.wait)
            for first, x_step in zip(firsts, x_steps, strict=True):
                sums = (sums[0] + product(ring, first, x_step, first_new),)
        else:
            for_each_row(unit, copy.wait)

            def add_step(step: jax.Array, sums: Any) -> Any:
                first = step * pieces.step
                return tuple(
                    total + product(ring, first, read_x(row, chunk + first), first_new)
                    for total, row in zip(sums, rows, strict=True)
                )

            sums = jax.lax.fori_loop(0, pieces.size // pieces.step, add_step, sums)

        @pl.when(unit + num_slots < num_units)
        def refill() -> None:
            plgpu.commit_smem()  # all threads have read the unit
            start_unit(unit + num_slots)

        return quad, sums

    def shrink_quad(quad: jax.Array, _: None) -> None:
        nothing = jnp.zeros((QUAD, CHUNK), jnp.float32)
        nothing = plgpu.layout_cast(nothing, layout.reduce(1))
        carry = (quad, (nothing,) * several)
        _, sums = jax.lax.fori_loop(0, pieces.count, add_piece, carry)
        for place, row, total in zip(places, rows, sums, strict=True):

            @pl.when(place <= work.last)
            def write(row: jax.Array = row, total: jax.Array = total) -> None:
                ranks = pl.ds(work.first_rank + quad * QUAD, QUAD)
                v_ref[row, work.place, ranks] = jnp.sum(total, axis=1)

    jax.lax.fori_loop(0, jnp.minimum(num_units, num_slots), start_unit, None)
    jax.lax.fori_loop(0, pl.cdiv(work.count, QUAD), shrink_quad, None)
    plgpu.commit_smem()  # all threads have read the ring: the next rows may use it


def lora_shrink_mosaic(
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
    """`lora_shrink` in Mosaic GPU. The width of x is a multiple of 128."""
    num_tokens = x.shape[0]
    row_chunks = whole_chunks(x.shape[1])
    if config is None:
        config = Config.heuristic(num_runs=len(adapters.slots) * len(modules))
    pieces = _Pieces.of(row_chunks, config.block_chunks)
    unit_bytes = QUAD * pieces.size * CHUNK * x.dtype.itemsize
    most_units = pl.cdiv(min(config.block_ranks, num_rows), QUAD) * pieces.count
    num_slots = min(max(1, config.ring_bytes // unit_bytes), MAX_BARRIERS // QUAD, most_units)
    page_chunks = chunks_per_page(adapters.pool)
    padded_rows = pl.cdiv(num_rows, config.block_ranks) * config.block_ranks
    kernel = functools.partial(
        _kernel,
        config=config,
        pieces=pieces,
        page_chunks=page_chunks,
        num_slots=num_slots,
        modules=modules,
        rank_split=rank_split,
        block_rows=block_rows,
    )
    v: jax.Array = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, len(modules), padded_rows), jnp.float32),
        scratch_types=(
            plgpu.SMEM((num_slots * QUAD, pieces.size, CHUNK), adapters.pool.dtype),
            plgpu.Barrier(num_barriers=num_slots * QUAD),
            plgpu.Barrier(num_arrivals=pieces.size, num_barriers=num_slots * QUAD),
        ),
        grid=(adapters.slots.shape[0], len(modules), padded_rows // config.block_ranks),
        grid_names=("tile", "module", "rank"),
        kernel_name="lora_shrink",
        interpret=interpret_params(interpret),
    )(
        x.reshape(num_tokens, row_chunks, CHUNK),
        *adapters._replace(pool=adapters.pool.reshape(-1, CHUNK)),
    )
    return v[:, :, :num_rows]
