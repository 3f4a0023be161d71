"""LoRA expand: bring each row back from its adapter's rank space and add it to the base output."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import lora_expand_mosaic as mosaic
from pallas_kernels import lora_expand_triton as triton
from pallas_kernels.adapter_layout import (
    check_adapter_tables,
    check_out_sizes,
    gather_rows,
    tile_rows,
    true_rank,
)
from pallas_kernels.dispatch import unknown_implementation
from pallas_kernels.lora_bmm import lora_expand_bmm
from pallas_kernels.tiles import LoraTiles
from pallas_kernels.triton_blocks import adapter_arrays


def lora_expand_reference(
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
    """The specification of `lora_expand`: tile by tile, one dense product a module."""
    num_ranks = v.shape[2]
    rank_index = jnp.arange(num_ranks, dtype=jnp.int32)

    def expand_tile(tile: jax.Array, y: jax.Array) -> jax.Array:
        rows, slot = tile_rows(tiles, tile), tiles.slots[tile]
        y_rows = y.at[rows].get(mode="fill", fill_value=0)
        column = column_offset
        for i, (module, out_size) in enumerate(zip(modules, out_sizes, strict=True)):
            segment = tiles.segments[layer, tile, module]
            rank = true_rank(segment)
            lora_b = gather_rows(
                pool, slot_pages[slot], segment[2], rank, num_rows=num_ranks, width=out_size
            )
            v_rows = v.at[rows, i].get(mode="fill", fill_value=0)
            v_rows = jnp.where(rank_index[None, :] < rank, v_rows, 0.0)
            delta = jnp.einsum("tr,rn->tn", v_rows, lora_b.astype(jnp.float32), precision="highest")
            old = jax.lax.dynamic_slice_in_dim(y_rows, column, out_size, axis=1)
            new = (old.astype(jnp.float32) + delta).astype(y.dtype)
            new = jnp.where(rank > 0, new, old)  # an absent module leaves even -0.0 as it is
            y_rows = jax.lax.dynamic_update_slice_in_dim(y_rows, new, column, axis=1)
            column = column + out_size
        return y.at[rows].set(y_rows, mode="drop")

    y: jax.Array = jax.lax.fori_loop(0, tiles.num_tiles[0], expand_tile, base)
    return y


def lora_expand(
    base: jax.Array | None,
    v: jax.Array,
    pool: jax.Array,
    slot_pages: jax.Array,
    layer: jax.Array,
    tiles: LoraTiles,
    column_offset: jax.Array,
    *,
    modules: tuple[int, ...],
    out_sizes: tuple[int, ...],
    implementation: str,
    config: triton.Config | mosaic.Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Add each row's low-rank product to the base output, several modules side by side.

    Without `base` the product alone, so that nothing here waits for the base's own product; whoever
    reads the base's output adds it there.

    Semantics: y = base, and for rows t in tiles, m = modules[i] present, n < out_sizes[i]:
               y[t, column_offset + sum(out_sizes[:i]) + n] += sum_{k < rank} v[t, i, k] B_m[k, n].
    Args:      base: `[T, W]`, given up to the result where the compiler can; or None, which stands
               for f32 zeros `[T, sum(out_sizes)]`: tiles then have one row, and column_offset is 0.
               v: f32 `[T, len(modules), R]`, R at least the rank of every slot in tiles.
               column_offset: i32 scalar, a multiple of gcd(128, W, *out_sizes). The rest as in
               `lora_shrink`.
    Returns:   y: base's dtype and shape; f32 accumulation, base included, and one rounding.
    Raises:    ValueError: shapes disagree or the implementation is unknown.
    Cost:      reads each tile's B once: sum over tiles and modules of rank * out elements.
    Source:    Punica (arXiv:2310.18547), SGMV; S-LoRA (arXiv:2311.03285), MBGMM and MBGMV.
    """
    check_adapter_tables(slot_pages, tiles)
    num_tokens = tiles.row_order.shape[0]
    if base is None:
        if not tiles.has_one_for_each_row:
            raise ValueError(
                f"tiles for {tiles.slots.shape[0]} times {tiles.block_rows} rows: without base "
                f"there is one for each of the {num_tokens} rows"
            )
    elif base.ndim != 2 or base.shape[0] != num_tokens or sum(out_sizes) > base.shape[1]:
        raise ValueError(
            f"base has shape {base.shape}, not [{num_tokens}, at least {sum(out_sizes)}]"
        )
    check_out_sizes(modules, out_sizes)
    if v.ndim != 3 or v.shape[:2] != (num_tokens, len(modules)):
        raise ValueError(f"v has shape {v.shape}, not [{num_tokens}, {len(modules)}, R]")
    if base is None and implementation != "triton":
        base = jnp.zeros((num_tokens, sum(out_sizes)), jnp.float32)
    if implementation in ("xla", "bmm"):
        assert base is not None
        dense = lora_expand_reference if implementation == "xla" else lora_expand_bmm
        return dense(
            base,
            v,
            pool,
            slot_pages,
            layer,
            tiles,
            column_offset,
            modules=modules,
            out_sizes=out_sizes,
        )
    if implementation == "triton":
        assert not isinstance(config, mosaic.Config)
        return triton.lora_expand_triton(
            base,
            v,
            adapter_arrays(pool, slot_pages, layer, tiles),
            column_offset,
            modules=modules,
            out_sizes=out_sizes,
            block_rows=tiles.block_rows,
            config=config,
            interpret=interpret,
        )
    if implementation == "mosaic":
        assert base is not None
        assert not isinstance(config, triton.Config)
        return mosaic.lora_expand_mosaic(
            base,
            v,
            adapter_arrays(pool, slot_pages, layer, tiles),
            column_offset,
            modules=modules,
            out_sizes=out_sizes,
            block_rows=tiles.block_rows,
            config=config,
            interpret=interpret,
        )
    raise unknown_implementation(implementation)
