"""LoRA as S-LoRA's baseline computes it (its "bmm"): gather, pad, one batched matrix product.

Each tile's A and B are copied out of the pool to a dense array at the largest rank there can be,
and all tiles are multiplied at once. What it costs beside kernels that read the pool in place is
measured, not served: every copy is written and read again, and rows of rank 8 cost what rows of
the largest rank do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.adapter_layout import CHUNK, KIND_LORA, chunks_per_page, chunks_per_row
from pallas_kernels.tiles import LoraTiles


def lora_shrink_bmm(
    x: jax.Array,
    pool: jax.Array,
    slot_pages: jax.Array,
    layer: jax.Array,
    tiles: LoraTiles,
    *,
    modules: tuple[int, ...],
    num_rows: int,
    rank_split: int,
) -> jax.Array:
    """`lora_shrink` of all tiles at once; see there. G tiles: copies G * num_rows * in elements."""
    rows = _rows(tiles)
    x_rows = x.at[rows].get(mode="fill", fill_value=0)
    v = jnp.zeros((x.shape[0], len(modules), num_rows), jnp.float32)
    for i, module in enumerate(modules):
        segments = tiles.segments[layer, :, module]
        valid = (_ranks(segments) + rank_split - 1) // rank_split
        lora_a = _gather(pool, slot_pages[tiles.slots], segments[:, 1], valid, num_rows, x.shape[1])
        product = jnp.einsum(
            "gtd,grd->gtr", x_rows, lora_a.astype(x.dtype), precision="highest",
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        v = v.at[rows, i].set(product, mode="drop")
    return v


def lora_expand_bmm(
    base: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    slot_pages: jax.Array,
    layer: jax.Array,
    tiles: LoraTiles,
    column_offset: jax.Array,
    *,
    modules: tuple[int, ...],
    out_sizes: tuple[int, ...],
) -> jax.Array:
    """`lora_expand` of all tiles at once; see there. G tiles: copies G * R * out elements.

    v is rounded to the pool's dtype, as the baseline kept it.
    """
    rows, num_ranks = _rows(tiles), v.shape[2]
    rank_index = jnp.arange(num_ranks, dtype=jnp.int32)
    y, column = base, column_offset
    for i, (module, out_size) in enumerate(zip(modules, out_sizes, strict=True)):
        segments = tiles.segments[layer, :, module]
        ranks = _ranks(segments)
        lora_b = _gather(pool, slot_pages[tiles.slots], segments[:, 2], ranks, num_ranks, out_size)
        v_rows = v.at[rows, i].get(mode="fill", fill_value=0)
        v_rows = jnp.where(rank_index[None, None, :] < ranks[:, None, None], v_rows, 0.0)
        delta = jnp.einsum(
            "gtr,grn->gtn", v_rows.astype(pool.dtype), lora_b,
            precision="highest", preferred_element_type=jnp.float32,
        )  # fmt: skip
        part = jax.lax.dynamic_slice_in_dim(y, column, out_size, axis=1)
        old = part.at[rows].get(mode="fill", fill_value=0)
        new = (old.astype(jnp.float32) + delta).astype(y.dtype)
        new = jnp.where(ranks[:, None, None] > 0, new, old)
        part = part.at[rows].set(new, mode="drop")
        y = jax.lax.dynamic_update_slice_in_dim(y, part, column, axis=1)
        column = column + out_size
    return y


def _rows(tiles: LoraTiles) -> jax.Array:
    """The rows of every tile, i32 `[G, block_rows]`; T, out of bounds, past a tile's end."""
    num_tokens = tiles.row_order.shape[0]
    place = jnp.arange(tiles.block_rows, dtype=jnp.int32)[None, :] + tiles.starts[:-1, None]
    rows = tiles.row_order.at[place].get(mode="fill", fill_value=num_tokens)
    return jnp.where(place < tiles.starts[1:, None], rows, num_tokens)


def _ranks(segments: jax.Array) -> jax.Array:
    """The true rank of each of `segments [G, 4]`; 0 where the module is absent."""
    return jnp.where(segments[:, 0] == KIND_LORA, segments[:, 3], 0)


def _gather(
    pool: jax.Array,
    pages: jax.Array,
    first_chunk: jax.Array,
    num_valid: jax.Array,
    num_rows: int,
    width: int,
) -> jax.Array:
    """Rows of A or B of all tiles, `[G, num_rows, width]` in the pool's dtype, zeros from
    `num_valid [G]` on. pages: `[G, max_adapter_pages]`; first_chunk: `[G]`.
    """
    page_chunks, row_chunks = chunks_per_page(pool), chunks_per_row(width)
    index = jnp.arange(num_rows * row_chunks, dtype=jnp.int32)
    chunk = first_chunk[:, None] + index[None, :]
    place = jnp.minimum(chunk // page_chunks, pages.shape[1] - 1)  # past the end: not valid
    page = jnp.take_along_axis(pages, place, axis=1)
    chunks = pool.reshape(-1, page_chunks, CHUNK)[page, chunk % page_chunks]
    rows = chunks.reshape(len(pages), num_rows, row_chunks * CHUNK)[:, :, :width]
    is_valid = jnp.arange(num_rows, dtype=jnp.int32)[None, :] < num_valid[:, None]
    return jnp.where(is_valid[:, :, None], rows, jnp.zeros((), rows.dtype))
