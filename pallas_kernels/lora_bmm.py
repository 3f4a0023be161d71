"""LoRA as S-LoRA's baseline computes it (its "bmm"): gather, pad, one batched matrix product.

Each tile's A and B are copied out of the pool to a dense array at the largest rank there can be,
and all tiles are multiplied at once. What it costs beside kernels that read the pool in place is
measured, not served: every copy is written and read again, and rows of rank 8 cost what rows of
the largest rank do.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.adapter_layout import gather_rows, tile_rows, true_rank
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
        valid = (jax.vmap(true_rank)(segments) + rank_split - 1) // rank_split
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
        ranks = jax.vmap(true_rank)(segments)
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
    rows: jax.Array = jax.vmap(functools.partial(tile_rows, tiles))(jnp.arange(len(tiles.slots)))
    return rows


def _gather(
    pool: jax.Array,
    pages: jax.Array,
    first_chunk: jax.Array,
    num_valid: jax.Array,
    num_rows: int,
    width: int,
) -> jax.Array:
    """`gather_rows` of all tiles, `[G, num_rows, width]`."""
    gather = functools.partial(gather_rows, pool, num_rows=num_rows, width=width)
    rows: jax.Array = jax.vmap(gather)(pages, first_chunk, num_valid)
    return rows
