"""LoRA expand in Pallas Mosaic GPU (Hopper), for tiles of few rows: as fast as B can be read.

A block owns some columns of one tile and module. The pieces of B's rows in its columns are copied
by TMA into a ring in shared memory, many at once, and added up on the CUDA cores.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

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

ROWS_AT_ONCE = 4  # rows of a tile that share a pass over B; their sums are held in registers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one block works."""

    block_chunks: int  # columns that a block owns, in chunks of 128, at most
    num_slots: int  # pieces of B on their way to a block

    @classmethod
    def heuristic(cls, *, num_runs: int) -> Config:
        """What was best on an H200 for so many tiles times modules."""
        if num_runs >= 128:
            return cls(block_chunks=16, num_slots=4)
        if num_runs >= 16:
            return cls(block_chunks=8, num_slots=16)
        return cls(block_chunks=2, num_slots=32)


@dataclasses.dataclass(frozen=True, slots=True)
class _ColumnBlock:
    """The columns that one block owns, in chunks."""

    place: int  # of the module in `modules`
    first: int  # within the module
    first_column: int  # within all modules
    size: int
    row_chunks: int  # of the module


def _column_blocks(row_chunks: list[int], block_chunks: int) -> list[_ColumnBlock]:
    blocks, column = [], 0
    for place, width in enumerate(row_chunks):
        for first in range(0, width, block_chunks):
            size = min(block_chunks, width - first)
            blocks.append(_ColumnBlock(place, first, column + first, size, width))
        column += width
    return blocks


def _kernel(
    v_ref: Ref,
    offset_ref: Ref,  # [1], in chunks
    *refs: Ref,
    blocks: list[_ColumnBlock],
    page_chunks: int,
    num_slots: int,
    modules: tuple[int, ...],
    block_rows: int,
) -> None:
    adapters, (y_ref, *memory) = AdapterArrays(*refs[:8]), refs[8:]
    tile, index = jax.lax.axis_index("tile"), jax.lax.axis_index("columns")

    def of_block(name: str) -> jax.Array:
        return select_static([getattr(block, name) for block in blocks], index)

    # what is read first waits for nothing: a padding tile has slot 0, which has no modules
    place, size = of_block("place"), of_block("size")
    segment = read_segment(adapters, tile, select_static(modules, place))
    tile_start, tile_stop = adapters.starts[tile], adapters.starts[tile + 1]
    column = offset_ref[0] + of_block("first_column")
    for static_size in sorted({block.size for block in blocks}):

        @pl.when((size == static_size) & (segment.rank > 0))
        def expand(size: int = static_size) -> None:
            work = _Work(
                place, segment, of_block("row_chunks"), of_block("first"), column, tile_stop - 1,
                size, num_slots, page_chunks,
            )  # fmt: skip

            def add_rows(group: jax.Array, _: None) -> None:
                start = tile_start + group * ROWS_AT_ONCE
                add = functools.partial(_add_rows, work, start, v_ref, adapters, y_ref, memory)
                pl.when(tile_stop - start == 1)(functools.partial(add, 1))
                if block_rows > 1:
                    pl.when(tile_stop - start > 1)(functools.partial(add, ROWS_AT_ONCE))

            jax.lax.fori_loop(0, pl.cdiv(tile_stop - tile_start, ROWS_AT_ONCE), add_rows, None)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a block knows of its work; i32 scalars but for the last three."""

    place: jax.Array
    segment: Segment
    row_chunks: jax.Array
    first: jax.Array  # chunk of the module
    column: jax.Array  # chunk of y
    last: jax.Array  # place of the tile's last row
    size: int  # chunks
    num_slots: int
    page_chunks: int


def _add_rows(
    work: _Work, start: jax.Array, v_ref: Ref, adapters: AdapterArrays, y_ref: Ref,
    memory: list[Ref], several: int,
) -> None:  # fmt: skip
    """Add to the rows `row_order[start : start + several]`, as far as the tile has them."""
    b_smem, whole, single = memory
    copy = ChunkCopy(
        adapters, work.segment.slot, work.page_chunks, work.size, whole, single, b_smem.shape[1]
    )
    rank = work.segment.rank
    places = [start + i for i in range(several)]
    rows = [adapters.row_order[jnp.minimum(place, work.last)] for place in places]
    columns = pl.ds(work.column, work.size)

    def piece_of(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        chunk = work.segment.b_chunk + k * work.row_chunks + work.first
        return chunk, jax.lax.rem(k, jnp.int32(work.num_slots))

    def start_piece(k: jax.Array, _: None = None) -> None:
        chunk, ring = piece_of(k)
        copy.start(chunk, b_smem, ring)

    def add_rank(k: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        factors = [v_ref[row, work.place, k] for row in rows]
        chunk, ring = piece_of(k)
        copy.wait(chunk, ring)
        b = b_smem[ring, pl.ds(0, work.size)].astype(jnp.float32)
        sums = tuple(total + factor * b for total, factor in zip(sums, factors, strict=True))

        @pl.when(k + work.num_slots < rank)
        def refill() -> None:
            plgpu.commit_smem()  # all threads have read the piece
            start_piece(k + work.num_slots)

        return sums

    jax.lax.fori_loop(0, jnp.minimum(rank, work.num_slots), start_piece, None)
    base = tuple(y_ref[row, columns].astype(jnp.float32) for row in rows)
    sums = jax.lax.fori_loop(0, rank, add_rank, base)
    for place, row, total in zip(places, rows, sums, strict=True):

        @pl.when(place <= work.last)
        def write(row: jax.Array = row, total: jax.Array = total) -> None:
            y_ref[row, columns] = total.astype(y_ref.dtype)

    plgpu.commit_smem()  # all threads have read the ring: the next rows may use it


def lora_expand_mosaic(
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
    """`lora_expand` in Mosaic GPU. All widths and the column offset are multiples of 128."""
    num_tokens, width = base.shape
    if config is None:
        config = Config.heuristic(num_runs=len(adapters.slots) * len(modules))
    blocks = _column_blocks([whole_chunks(size) for size in out_sizes], config.block_chunks)
    ring = min(config.num_slots, v.shape[2], MAX_BARRIERS)
    size = max(block.size for block in blocks)
    page_chunks = chunks_per_page(adapters.pool)
    kernel = functools.partial(
        _kernel,
        blocks=blocks,
        page_chunks=page_chunks,
        num_slots=ring,
        modules=modules,
        block_rows=block_rows,
    )
    y_ref = jax.new_ref(base.reshape(num_tokens, whole_chunks(width), CHUNK))
    plgpu.kernel(
        kernel,
        out_type=(),
        scratch_types=(
            plgpu.SMEM((ring, size, CHUNK), adapters.pool.dtype),
            plgpu.Barrier(num_barriers=ring),
            plgpu.Barrier(num_arrivals=size, num_barriers=ring),
        ),
        grid=(adapters.slots.shape[0], len(blocks)),
        grid_names=("tile", "columns"),
        kernel_name="lora_expand",
        interpret=interpret_params(interpret),
    )(
        v,
        jax.lax.div(jnp.asarray(column_offset, jnp.int32), jnp.int32(CHUNK)).reshape(1),
        *adapters._replace(pool=adapters.pool.reshape(-1, CHUNK)),
        y_ref,
    )
    return jax.freeze(y_ref).reshape(base.shape)
