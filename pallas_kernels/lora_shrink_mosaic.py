"""LoRA shrink in Pallas Mosaic GPU (Hopper), for tiles of few rows: as fast as A can be read.

A block owns some ranks of one tile and module. Whole rows of A are copied by TMA into a ring in
shared memory, many at once, and multiplied on the CUDA cores, one row of the tile after the other.
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
from pallas_kernels.triton_blocks import AdapterArrays, read_segment, select_static


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one block works."""

    block_ranks: int = 8  # rows of A that a block owns
    block_chunks: int = 32  # chunks in a copy, at most
    ring_bytes: int = 65_536  # rows of A on their way to a block


@dataclasses.dataclass(frozen=True, slots=True)
class _Pieces:
    """A row of A in pieces of one size; the last begins early rather than end late."""

    row_chunks: int
    size: int  # chunks

    @classmethod
    def of(cls, row_chunks: int, block_chunks: int) -> _Pieces:
        count = pl.cdiv(row_chunks, block_chunks)
        size = pl.cdiv(pl.cdiv(row_chunks, count), 8) * 8  # 8 chunks are 16 bytes a thread
        return cls(row_chunks, min(size, row_chunks))

    @property
    def starts(self) -> list[int]:
        return [
            min(start, self.row_chunks - self.size)
            for start in range(0, self.row_chunks, self.size)
        ]

    def first_new(self, piece: int) -> int:
        """The first chunk of a piece that the piece before it does not have."""
        return piece * self.size - self.starts[piece]


def _kernel(
    x_ref: Ref,  # [T, row_chunks, 128]
    *refs: Ref,
    config: Config,
    pieces: _Pieces,
    page_chunks: int,
    num_slots: int,
    modules: tuple[int, ...],
    rank_split: int,
) -> None:
    adapters, (v_ref, a_smem, whole, single) = AdapterArrays(*refs[:-4]), refs[-4:]
    tile, place = jax.lax.axis_index("tile"), jax.lax.axis_index("module")
    first_rank = jax.lax.axis_index("rank") * config.block_ranks

    # what is read first waits for nothing: a padding tile has slot 0, which has no modules
    segment = read_segment(adapters, tile, select_static(modules, place))
    start, stop = adapters.starts[tile], adapters.starts[tile + 1]
    first_row = adapters.row_order[jnp.minimum(start, x_ref.shape[0] - 1)]
    num_ranks = jax.lax.div(segment.rank + (rank_split - 1), jnp.int32(rank_split))
    count = jnp.minimum(num_ranks - first_rank, config.block_ranks)
    copy = ChunkCopy(adapters, segment.slot, page_chunks, pieces.size, whole, single, pieces.size)
    num_pieces = len(pieces.starts)

    def place_of(rank: jax.Array, piece: int) -> tuple[jax.Array, jax.Array]:
        """The first chunk of a piece of A, and its place in the ring."""
        chunk = segment.a_chunk + (first_rank + rank) * pieces.row_chunks
        ring = jax.lax.rem(rank, jnp.int32(num_slots)) * num_pieces + piece
        return chunk + pieces.starts[piece], ring

    def start_row(rank: jax.Array, _: None = None) -> None:
        for piece in range(num_pieces):
            chunk, ring = place_of(rank, piece)
            copy.start(chunk, a_smem, ring)

    def read_x(row: jax.Array) -> list[jax.Array]:
        return [x_ref[row, pl.ds(first, pieces.size)] for first in pieces.starts]

    def multiply(rank: jax.Array, x: list[jax.Array], row: jax.Array) -> None:
        product = jnp.zeros((pieces.size, CHUNK), jnp.float32)
        for piece, x_piece in enumerate(x):
            a = a_smem[place_of(rank, piece)[1]].astype(jnp.float32)
            if pieces.first_new(piece):
                chunk = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
                a = jnp.where(chunk >= pieces.first_new(piece), a, 0.0)
            product = product + a * x_piece.astype(jnp.float32)
        v_ref[row, place, first_rank + rank] = jnp.sum(product)

    @pl.when(count > 0)
    def shrink_tile() -> None:
        jax.lax.fori_loop(0, jnp.minimum(count, num_slots), start_row, None)
        first_x = read_x(first_row)

        def shrink_row(rank: jax.Array, _: None) -> None:
            for piece in range(num_pieces):
                copy.wait(*place_of(rank, piece))
            multiply(rank, first_x, first_row)

            def multiply_other(row_place: jax.Array, _: None) -> None:
                row = adapters.row_order[row_place]
                multiply(rank, read_x(row), row)

            jax.lax.fori_loop(start + 1, stop, multiply_other, None)

            @pl.when(rank + num_slots < count)
            def refill() -> None:
                plgpu.commit_smem()  # all threads have read the row
                start_row(rank + num_slots)

        jax.lax.fori_loop(0, count, shrink_row, None)


def lora_shrink_mosaic(
    x: jax.Array,
    adapters: AdapterArrays,
    *,
    modules: tuple[int, ...],
    num_rows: int,
    rank_split: int,
    config: Config | None,
    interpret: bool,
) -> jax.Array:
    """`lora_shrink` in Mosaic GPU. The width of x is a multiple of 128."""
    num_tokens = x.shape[0]
    row_chunks = whole_chunks(x.shape[1])
    config = config or Config()
    pieces = _Pieces.of(row_chunks, config.block_chunks)
    row_bytes = len(pieces.starts) * pieces.size * CHUNK * x.dtype.itemsize
    fitting = min(max(2, config.ring_bytes // row_bytes), MAX_BARRIERS // len(pieces.starts))
    num_slots = min(config.block_ranks, num_rows, fitting)
    ring = num_slots * len(pieces.starts)
    page_chunks = chunks_per_page(adapters.pool)
    kernel = functools.partial(
        _kernel,
        config=config,
        pieces=pieces,
        page_chunks=page_chunks,
        num_slots=num_slots,
        modules=modules,
        rank_split=rank_split,
    )
    v: jax.Array = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, len(modules), num_rows), jnp.float32),
        scratch_types=(
            plgpu.SMEM((ring, pieces.size, CHUNK), adapters.pool.dtype),
            plgpu.Barrier(num_barriers=ring),
            plgpu.Barrier(num_arrivals=pieces.size, num_barriers=ring),
        ),
        grid=(adapters.slots.shape[0], len(modules), pl.cdiv(num_rows, config.block_ranks)),
        grid_names=("tile", "module", "rank"),
        kernel_name="lora_shrink",
        interpret=interpret_params(interpret),
    )(
        x.reshape(num_tokens, row_chunks, CHUNK),
        *adapters._replace(pool=adapters.pool.reshape(-1, CHUNK)),
    )
    return v
