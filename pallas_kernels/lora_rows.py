"""LoRA of single rows, down to the rank space and back in one op."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.adapter_layout import check_adapter_tables, check_out_sizes, check_rows
from pallas_kernels.dispatch import unknown_implementation
from pallas_kernels.lora_expand import lora_expand_reference
from pallas_kernels.lora_rows_triton import Config, lora_rows_triton
from pallas_kernels.lora_shrink import lora_shrink_reference
from pallas_kernels.tiles import LoraTiles
from pallas_kernels.triton_blocks import adapter_arrays
from pallas_kernels.tuning_table import shape_key, tuned


def lora_rows_reference(
    x: jax.Array,
    pool: jax.Array,
    slot_pages: jax.Array,
    layer: jax.Array,
    tiles: LoraTiles,
    *,
    modules: tuple[int, ...],
    out_sizes: tuple[int, ...],
    max_rank: int,
) -> jax.Array:
    """The specification of `lora_rows`: shrink, then expand over zeros."""
    place = (pool, slot_pages, layer, tiles)
    num_tokens = tiles.row_order.shape[0]
    v = lora_shrink_reference(
        x[:num_tokens], *place, modules=modules, num_rows=max_rank, rank_split=1
    )
    nothing = jnp.zeros((num_tokens, sum(out_sizes)), jnp.float32)
    return lora_expand_reference(
        nothing, v, *place, jnp.int32(0), modules=modules, out_sizes=out_sizes
    )


def lora_rows(
    x: jax.Array,
    pool: jax.Array,
    slot_pages: jax.Array,
    layer: jax.Array,
    tiles: LoraTiles,
    *,
    modules: tuple[int, ...],
    out_sizes: tuple[int, ...],
    max_rank: int,
    implementation: str,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """What adapters add to several modules of one input, for rows that are a tile each.

    Semantics: y[t, sum(out_sizes[:i]) + n] = sum_{k < rank} (sum_d x[t, d] A_m[k, d]) B_m[k, n] for
               rows t in tiles, m = modules[i] present, n < out_sizes[i]; 0 elsewhere.
    Args:      x: `[at least T, in]`; what is past the T rows of `tiles` is not read.
               pool, slot_pages, layer: as in `lora_shrink`. tiles: of one row each, T at least.
               max_rank: at least the rank of every slot in tiles.
               config: how the kernel works; needed by "triton", see `chosen_config`.
               interpret: run the kernel in the interpreter, on any device.
    Returns:   y: f32 `[T, sum(out_sizes)]`, accumulated in f32.
    Raises:    ValueError: shapes disagree or the implementation is unknown.
    Cost:      reads each row's A and B once from memory: rank * (in + out) elements a module.
    Source:    S-LoRA (arXiv:2311.03285), MBGMV.
    """
    check_adapter_tables(slot_pages, tiles)
    check_rows(x, tiles)
    if not tiles.has_one_for_each_row:
        raise ValueError(
            f"tiles for {tiles.slots.shape[0]} times {tiles.block_rows} rows, allowed: one for "
            f"each of the {tiles.row_order.shape[0]} rows"
        )
    check_out_sizes(modules, out_sizes)
    if implementation == "xla":
        return lora_rows_reference(
            x, pool, slot_pages, layer, tiles, modules=modules, out_sizes=out_sizes,
            max_rank=max_rank,
        )  # fmt: skip
    if implementation != "triton":
        raise unknown_implementation(implementation)
    if config is None:
        raise ValueError("config: got None, allowed for triton: a configuration")
    return lora_rows_triton(
        x, adapter_arrays(pool, slot_pages, layer, tiles), modules=modules, out_sizes=out_sizes,
        config=config, interpret=interpret,
    )  # fmt: skip


def chosen_config(num_tokens: int, width: int, out_sizes: tuple[int, ...]) -> Config | None:
    """How one kernel serves these shapes; None where two are the faster known choice, or nothing
    was measured.
    """
    return tuned("lora_rows", table_key(num_tokens, width, out_sizes), Config)


def table_key(num_tokens: int, width: int, out_sizes: tuple[int, ...]) -> str:
    """Of a shape in the tuning table."""
    sizes = {"num_modules": len(out_sizes), "num_tokens": num_tokens, "width": width}
    return shape_key(out=sum(out_sizes), **sizes)
