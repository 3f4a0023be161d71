"""What the Pallas-Triton kernels share: how one is launched, how it finds tiles and adapter chunks.

Inside a kernel every reference is a whole array in device memory and is indexed with full index
arrays and masks, the one idiom that the interpreter and the compiler both serve well. Pools are
indexed [page, offset], never flattened: a flat index into a large pool does not fit 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.adapter_layout import CHUNK, KIND_LORA
from pallas_kernels.tiles import LoraTiles

MIN_DOT = 16  # rows and depth of the smallest tensor-core product
Ref = Any  # Pallas has no public type for the references that a kernel gets


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def triton_call(
    kernel: Callable[..., None],
    out_shape: Any,
    *,
    name: str,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """A Pallas-Triton kernel over whole arrays; `aliases` maps inputs to the outputs they become.

    Triton is named outright: without compiler_params the backend depends on the JAX version.
    """
    call: Callable[..., Any] = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        input_output_aliases=aliases or {},
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )
    return call


class AdapterArrays(NamedTuple):
    """What a LoRA kernel reads beside its rows; inside the kernel, the references to them."""

    pool: Ref
    slot_pages: Ref
    segments: Ref
    layer: Ref  # [1]
    row_order: Ref
    starts: Ref
    slots: Ref
    num_tiles: Ref  # [1]


def adapter_arrays(
    pool: jax.Array,
    slot_pages: jax.Array,
    segments: jax.Array,
    layer: jax.Array,
    tiles: LoraTiles,
) -> AdapterArrays:
    """The arguments of a LoRA op in the order in which its kernel takes them."""
    return AdapterArrays(
        pool=pool,
        slot_pages=slot_pages,
        segments=segments,
        layer=jnp.asarray(layer, jnp.int32).reshape(1),
        row_order=tiles.row_order,
        starts=tiles.starts,
        slots=tiles.slots,
        num_tiles=tiles.num_tiles,
    )


class Segment(NamedTuple):
    """One module of one slot in the layer at hand: i32 scalars inside a kernel."""

    slot: jax.Array
    a_chunk: jax.Array
    b_chunk: jax.Array
    rank: jax.Array  # true rank; 0 where the module is absent


def read_segment(adapters: AdapterArrays, tile: jax.Array, module: jax.Array) -> Segment:
    """The segment that `tile` uses of `module`."""
    slot, layer = adapters.slots[tile], adapters.layer[0]
    kind, a_chunk, b_chunk, rank = (adapters.segments[layer, slot, module, i] for i in range(4))
    return Segment(slot, a_chunk, b_chunk, jnp.where(kind == KIND_LORA, rank, 0))


def read_tile_rows(
    adapters: AdapterArrays, tile: jax.Array, num_places: int
) -> tuple[jax.Array, jax.Array]:
    """Row indices `[num_places]` of a tile, and which of the places are real.

    The others hold T, out of bounds: in a masked store, the interpreter lets an index that occurs
    twice write back the old value.
    """
    num_tokens = adapters.row_order.shape[0]
    place = adapters.starts[tile] + jnp.arange(num_places, dtype=jnp.int32)
    is_row = place < adapters.starts[tile + 1]
    return pltriton.load(adapters.row_order.at[place], mask=is_row, other=num_tokens), is_row


def read_chunks(
    adapters: AdapterArrays, slot: jax.Array, chunk: jax.Array, is_real: jax.Array
) -> jax.Array:
    """Chunks `[..., 128]` of a slot by their numbers in its run; zeros where not `is_real`.

    Every chunk finds its own page, so that a row may straddle pages anywhere.
    """
    page_chunks = jnp.int32(adapters.pool.shape[1] // CHUNK)
    place = jax.lax.div(chunk, page_chunks)
    page = pltriton.load(
        adapters.slot_pages.at[jnp.full_like(place, slot), place], mask=is_real, other=0
    )
    shape = (*chunk.shape, CHUNK)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, chunk.ndim)
    first = jax.lax.rem(chunk, page_chunks) * CHUNK
    chunks: jax.Array = pltriton.load(
        adapters.pool.at[page[..., None], first[..., None] + lane],
        mask=jnp.broadcast_to(is_real[..., None], shape),
        other=0,
    )
    return chunks


def select_static(values: Sequence[int], index: jax.Array) -> jax.Array:
    """`values[index]` for Python integers: kernels cannot hold constant arrays."""
    chosen: jax.Array = jnp.asarray(values[0], jnp.int32)
    for i, value in enumerate(values[1:], start=1):
        chosen = jnp.where(index == i, jnp.int32(value), chosen)
    return chosen


def dot_f32(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
    """Product accumulated in f32; f32 inputs are not rounded to tf32."""
    product: jax.Array = pltriton.dot(a, b, trans_b=trans_b, allow_tf32=False)
    return product
