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

NUM_PROGRAMS = 768  # enough for the 132 multiprocessors of an H200
NUM_TILE_PROGRAMS = 128  # the same, of programs that fill one each
MIN_TILE_PROGRAMS = 8  # of a short prompt or a few
MIN_DOT = 16  # rows and depth of the smallest tensor-core product
Ref = Any  # Pallas has no public type for the references that a kernel gets


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def fitting_chunks(most: int, row_chunks: int, page_chunks: int) -> int:
    """At most `most` chunks of a row, a power of two: a block of it lies in two pages at most."""
    return min(most, next_power_of_2(row_chunks), 1 << (page_chunks.bit_length() - 1))


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
    layer: jax.Array,
    tiles: LoraTiles,
) -> AdapterArrays:
    """The arguments of a LoRA op in the order in which its kernel takes them."""
    return AdapterArrays(
        pool=pool,
        slot_pages=slot_pages,
        segments=tiles.segments,
        layer=jnp.asarray(layer, jnp.int32).reshape(1),
        row_order=tiles.row_order,
        starts=tiles.starts,
        slots=tiles.slots,
        num_tiles=tiles.num_tiles,
    )


class Segment(NamedTuple):
    """One module of one tile's slot in the layer at hand: i32 scalars inside a kernel."""

    slot: jax.Array
    a_chunk: jax.Array
    b_chunk: jax.Array
    rank: jax.Array  # true rank; 0 where the module is absent


def read_segment(adapters: AdapterArrays, tile: jax.Array, module: jax.Array) -> Segment:
    """The segment that `tile` uses of `module`."""
    layer = adapters.layer[0]
    kind, a_chunk, b_chunk, rank = (adapters.segments[layer, tile, module, i] for i in range(4))
    return Segment(adapters.slots[tile], a_chunk, b_chunk, jnp.where(kind == KIND_LORA, rank, 0))


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


class Rows(NamedTuple):
    """Where parts of successive rows of A or B lie: in runs of chunks no longer than a page.

    Such a run lies in two pages at most. One run holds the parts of all rows if that is sure to
    fit, which saves a look-up a row; else each row has a run of its own.
    """

    page: jax.Array  # where the run starts; a scalar or [n]
    next_page: jax.Array
    first: jax.Array  # the run's first chunk, counted in `page`
    offset: jax.Array  # [n] chunks from the run's start to the row's part


def find_rows(
    adapters: AdapterArrays,
    slot: jax.Array,
    first_chunk: jax.Array,
    row_chunks: jax.Array | int,
    *,
    num_rows: int,
    max_row_chunks: int,
) -> Rows:
    """The parts of `num_rows` rows that start every `row_chunks` chunks from `first_chunk` on."""
    page_chunks = adapters.pool.shape[1] // CHUNK
    last_place = adapters.slot_pages.shape[1] - 1
    offset = jnp.arange(num_rows, dtype=jnp.int32) * row_chunks
    if num_rows * max_row_chunks > page_chunks:
        first_chunk, offset = first_chunk + offset, jnp.zeros_like(offset)
    place = jax.lax.div(first_chunk, jnp.int32(page_chunks))

    def read(place: jax.Array) -> jax.Array:
        place = jnp.minimum(place, last_place)  # rows past the rank may lie beyond the last page
        page: jax.Array = adapters.slot_pages[jnp.full_like(place, slot), place]
        return page

    first = jax.lax.rem(first_chunk, jnp.int32(page_chunks))
    return Rows(read(place), read(place + 1), first, offset)


def read_rows(
    adapters: AdapterArrays,
    rows: Rows,
    chunk: jax.Array,
    is_real: jax.Array,
    lane: jax.Array | None = None,
) -> jax.Array:
    """Chunks `chunk [...]` of each part, `[n, ..., 128]`; zeros where not `is_real [n, ...]`.

    With `lane [w]` only these elements of each chunk, `[n, ..., w]`.
    """
    page_chunks = jnp.int32(adapters.pool.shape[1] // CHUNK)

    def spread(field: jax.Array) -> jax.Array:
        return field.reshape(-1, *(1,) * chunk.ndim) if field.ndim else field

    at = spread(rows.offset) + chunk[None] + spread(rows.first)
    is_first = at < page_chunks
    page = jnp.where(is_first, spread(rows.page), spread(rows.next_page))
    at = jnp.where(is_first, at, at - page_chunks)
    lane = jnp.arange(CHUNK, dtype=jnp.int32) if lane is None else lane
    shape = (*at.shape, lane.shape[0])
    lane = jax.lax.broadcast_in_dim(lane, shape, (at.ndim,))
    is_real = jnp.broadcast_to(is_real, at.shape)
    chunks: jax.Array = pltriton.load(
        adapters.pool.at[page[..., None], (at * CHUNK)[..., None] + lane],
        mask=jnp.broadcast_to(is_real[..., None], shape),
        other=0,
    )
    return chunks


def num_tile_programs(tiles: AdapterArrays | LoraTiles, block_rows: int) -> int:
    """Programs along the axis of tiles: each takes every n-th tile.

    Tiles are rarely as many as there may be, and even a program without one takes its time. Tiles
    of one row have a program each, no more than there are rows: one beyond would read a row's
    index from behind `row_order`.
    """
    capacity: int = tiles.slots.shape[0]
    num_tokens: int = tiles.row_order.shape[0]
    if block_rows == 1:
        return min(capacity, num_tokens)
    return min(capacity, max(MIN_TILE_PROGRAMS, 2 * -(-num_tokens // block_rows)))


def for_each_tile(
    adapters: AdapterArrays,
    body: Callable[[jax.Array], None],
    *,
    block_rows: int,
    axis: int,
) -> None:
    """Run `body` for the tiles of this program.

    Tiles of one row have a program each, and a padding tile ends by its slot, whose rank is 0: no
    load of `num_tiles` delays the others.
    """
    tile, stride = pl.program_id(axis), num_tile_programs(adapters, block_rows)
    if block_rows == 1 or stride == adapters.slots.shape[0]:
        body(tile)
        return

    def step(i: jax.Array, _: jax.Array) -> jax.Array:
        body(tile + i * stride)
        return _

    num_steps = jax.lax.div(adapters.num_tiles[0] - tile + (stride - 1), jnp.int32(stride))
    jax.lax.fori_loop(0, num_steps, step, jnp.int32(0))


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
