"""LoRA of single rows in one Pallas-Triton kernel: a program a row and block of output chunks.

What `lora_shrink` and `lora_expand` do in two, without a launch between them. Every program shrinks
its row by itself, so A comes from the cache as often as its module's output has blocks; rows of B
are on their way while those of A are multiplied.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.adapter_layout import CHUNK, chunks_per_page, chunks_per_row
from pallas_kernels.lora_expand_triton import column_blocks, find_columns, fitting_chunks
from pallas_kernels.lora_shrink_triton import load_row, rank_products
from pallas_kernels.triton_blocks import (
    AdapterArrays,
    Ref,
    find_rows,
    read_rows,
    read_segment,
    select_static,
    triton_call,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one program works; it owns a row and a block of chunks of one module's output."""

    block_chunks: int
    row_ranks: int  # rows of A and of B in a step of the loop
    num_warps: int
    num_stages: int = 1
    row_chunks: int = 32  # chunks of a row of A that are loaded at once


def _kernel(
    x_ref: Ref,
    adapters: AdapterArrays,
    y_ref: Ref,
    *,
    config: Config,
    modules: tuple[int, ...],
    out_sizes: tuple[int, ...],
) -> None:
    tile = pl.program_id(1)
    place, first_chunk = find_columns(pl.program_id(0), out_sizes, config.block_chunks)
    x_row = load_row(x_ref, adapters, tile, config.row_chunks)
    segment = read_segment(adapters, tile, select_static(modules, place))
    all_chunks = [chunks_per_row(size) for size in out_sizes]
    row_chunks = select_static(all_chunks, place)
    is_exact = all(size % (config.block_chunks * CHUNK) == 0 for size in out_sizes)
    index = jnp.arange(config.block_chunks, dtype=jnp.int32)

    def add_ranks(step: jax.Array, delta: jax.Array) -> jax.Array:
        first_rank = step * config.row_ranks
        is_rank = first_rank + jnp.arange(config.row_ranks, dtype=jnp.int32) < segment.rank
        rows = find_rows(
            adapters,
            segment.slot,
            segment.b_chunk + first_rank * row_chunks + first_chunk,
            row_chunks,
            num_rows=config.row_ranks,
            max_row_chunks=max(all_chunks),
        )
        is_real = is_rank[:, None]
        if not is_exact:
            is_real = is_real & (index < row_chunks - first_chunk)[None, :]
        b = read_rows(adapters, rows, index, is_real)
        products = rank_products(x_row, adapters, segment, first_rank, is_rank, x_ref.shape[1])
        v = jnp.sum(products, axis=1)
        return delta + jnp.sum(v[:, None, None] * b.astype(jnp.float32), axis=0)

    shape = (config.block_chunks, CHUNK)
    num_steps = pl.cdiv(segment.rank, config.row_ranks)  # none for a row without an adapter
    delta = jax.lax.fori_loop(0, num_steps, add_ranks, jnp.zeros(shape, jnp.float32))
    column = (first_chunk + jax.lax.broadcasted_iota(jnp.int32, shape, 0)) * CHUNK
    column = column + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    first_column = select_static([sum(out_sizes[:i]) for i in range(len(out_sizes))], place)
    mask = None if is_exact else column < select_static(out_sizes, place)
    where = (jnp.full_like(column, x_row.row), first_column + column)
    pltriton.store(y_ref.at[where], delta, mask=mask)


def lora_rows_triton(
    x: jax.Array,
    adapters: AdapterArrays,
    *,
    modules: tuple[int, ...],
    out_sizes: tuple[int, ...],
    config: Config,
    interpret: bool,
) -> jax.Array:
    """`lora_rows` in Pallas-Triton."""
    block_chunks = fitting_chunks(config.block_chunks, out_sizes, chunks_per_page(adapters.pool))
    config = dataclasses.replace(config, block_chunks=block_chunks)
    num_tokens = adapters.row_order.shape[0]
    y: jax.Array = triton_call(
        functools.partial(_kernel, config=config, modules=modules, out_sizes=out_sizes),
        jax.ShapeDtypeStruct((num_tokens, sum(out_sizes)), jnp.float32),
        name="lora_rows",
        grid=(column_blocks(out_sizes, block_chunks)[1], num_tokens),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(x, adapters)
    return y
