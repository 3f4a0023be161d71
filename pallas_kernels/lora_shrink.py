"""LoRA shrink: project each row into its adapter's rank space, straight from the page pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import lora_shrink_mosaic as mosaic
from pallas_kernels import lora_shrink_triton as triton
from pallas_kernels.adapter_layout import (
    check_adapter_tables,
    check_rows,
    gather_rows,
    tile_rows,
    true_rank,
)
from pallas_kernels.dispatch import unknown_implementation
from pallas_kernels.lora_bmm import lora_shrink_bmm
from pallas_kernels.tiles import LoraTiles
from pallas_kernels.triton_blocks import adapter_arrays


def lora_shrink_reference(
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
    """The specification of `lora_shrink`: tile by tile, one dense product a module."""
    num_tokens, width = x.shape

    def shrink_tile(tile: jax.Array, v: jax.Array) -> jax.Array:
        rows, slot = tile_rows(tiles, tile), tiles.slots[tile]
        x_rows = x.at[rows].get(mode="fill", fill_value=0).astype(jnp.float32)
        for i, module in enumerate(modules):
            segment = tiles.segments[layer, tile, module]
            lora_a = gather_rows(
                pool,
                slot_pages[slot],
                segment[1],
                (true_rank(segment) + rank_split - 1) // rank_split,
                num_rows=num_rows,
                width=width,
            )
            product = jnp.einsum(
                "td,rd->tr", x_rows, lora_a.astype(jnp.float32), precision="highest"
            )
            v = v.at[rows, i].set(product, mode="drop")
        return v

    v = jnp.zeros((num_tokens, len(modules), num_rows), jnp.float32)
    shrunk: jax.Array = jax.lax.fori_loop(0, tiles.num_tiles[0], shrink_tile, v)
    return shrunk


def lora_shrink(
    x: jax.Array,
    pool: jax.Array,
    slot_pages: jax.Array,
    layer: jax.Array,
    tiles: LoraTiles,
    *,
    modules: tuple[int, ...],
    num_rows: int,
    rank_split: int,
    implementation: str,
    config: triton.Config | mosaic.Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Project rows into the rank space of their adapters, several modules of one input at once.

    Semantics: v[t, i, j] = sum_d x[t, d] * A_m[j, d]  for rows t in tiles, m = modules[i] present,
               j < ceil(rank / rank_split); everything else in v is undefined.
    Args:      x: `[at least T, in]`; what is past the T rows of `tiles` is not read.
               pool: `[num_pages, page_elems]`, of x's dtype or another float.
               slot_pages: i32 `[S, max_adapter_pages]`. layer: i32 scalar.
               num_rows: rows of v, at least ceil(rank / rank_split) of every slot in tiles.
               rank_split: devices over which the rank rows are dealt (1 for o and down).
               config: how the kernel works, in place of the measured or heuristic choice.
               interpret: run the kernel in the interpreter, on any device.
    Returns:   v: f32 `[T, len(modules), num_rows]`.
    Raises:    ValueError: shapes disagree or the implementation is unknown.
    Cost:      reads each tile's A once: rank / rank_split * in elements a tile and module.
    Source:    Punica (arXiv:2310.18547), SGMV; S-LoRA (arXiv:2311.03285), MBGMM and MBGMV.
    """
    check_adapter_tables(slot_pages, tiles)
    check_rows(x, tiles)
    if implementation != "triton":
        x = x[: tiles.row_order.shape[0]]  # a copy, which the others can bear
    if implementation in ("xla", "bmm"):
        dense = lora_shrink_reference if implementation == "xla" else lora_shrink_bmm
        return dense(
            x,
            pool,
            slot_pages,
            layer,
            tiles,
            modules=modules,
            num_rows=num_rows,
            rank_split=rank_split,
        )
    if implementation == "triton":
        assert not isinstance(config, mosaic.Config)
        return triton.lora_shrink_triton(
            x,
            adapter_arrays(pool, slot_pages, layer, tiles),
            modules=modules,
            num_rows=num_rows,
            rank_split=rank_split,
            block_rows=tiles.block_rows,
            config=config,
            interpret=interpret,
        )
    if implementation == "mosaic":
        assert not isinstance(config, triton.Config)
        return mosaic.lora_shrink_mosaic(
            x,
            adapter_arrays(pool, slot_pages, layer, tiles),
            modules=modules,
            num_rows=num_rows,
            rank_split=rank_split,
            block_rows=tiles.block_rows,
            config=config,
            interpret=interpret,
        )
    raise unknown_implementation(implementation)
