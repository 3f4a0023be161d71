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
from pallas_kernels.lora_expand_triton import (
    block_columns,
    column_blocks,
    find_columns,
    is_exact,
    make_block,
    read_block,
    starts_of,
)
from pallas_kernels.lora_shrink_triton import load_row, rank_products
from pallas_kernels.triton_blocks import (
    AdapterArrays,
    Ref,
    fitting_chunks,
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
    tile, block_chunks = pl.program_id(1), config.block_chunks
    place, first_chunk = find_columns(pl.program_id(0), out_sizes, block_chunks)
    x_row = load_row(x_ref, adapters, tile, config.row_chunks)
    segment = read_segment(adapters, tile, select_static(modules, place))
    first_column = select_static(starts_of(out_sizes), place)
    block = make_block(tile, place, segment, first_chunk, first_column, out_sizes)
    exact = is_exact(out_sizes, block_chunks)

    def add_ranks(step: jax.Array, delta: jax.Array) -> jax.Array:
        first_rank = step * config.row_ranks
        is_rank = first_rank + jnp.arange(config.row_ranks, dtype=jnp.int32) < segment.rank
        b = read_block(adapters, block, step, is_rank, block_chunks, exact)
        products = rank_products(x_row, adapters, segment, first_rank, is_rank, x_ref.shape[1])
        v = jnp.sum(products, axis=1)
        return delta + jnp.sum(v[:, None, None] * b.astype(jnp.float32), axis=0)

    num_steps = pl.cdiv(segment.rank, config.row_ranks)  # none for a row without an adapter
    nothing = jnp.zeros((block_chunks, CHUNK), jnp.float32)
    delta = jax.lax.fori_loop(0, num_steps, add_ranks, nothing)
    where, is_column = block_columns(block, x_row.row, block_chunks, exact)
    pltriton.store(y_ref.at[where], delta, mask=is_column)


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
    widest = max(map(chunks_per_row, out_sizes))
    block_chunks = fitting_chunks(config.block_chunks, widest, chunks_per_page(adapters.pool))
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
