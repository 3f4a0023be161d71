"""Where an adapter's rows lie in the page pool, and how the references read them.

A row of A or B is a run of whole chunks of 128 elements. A chunk never straddles a page; a row may,
and the next physical page can be another tenant's, so the page is looked up chunk by chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import LoraTiles

CHUNK = 128  # elements; every row starts on a chunk and is padded with zeros to whole chunks
KIND_LORA = 1  # segments[..., 0]; 0 says that the adapter lacks the module
NUM_MODULES = 7  # q, k, v, o, gate, up, down


def chunks_per_row(width: int) -> int:
    """Chunks that a row of `width` elements occupies."""
    return -(-width // CHUNK)


def chunks_per_page(pool: jax.Array) -> int:
    """Chunks in a page of `pool [num_pages, page_elems]`."""
    page_elems = pool.shape[1]
    if page_elems % CHUNK:
        raise ValueError(f"page_elems {page_elems} is not a multiple of {CHUNK}")
    return page_elems // CHUNK


def true_rank(segment: jax.Array) -> jax.Array:
    """The rank of one `segments[layer, tile, module]`; 0 where the module is absent."""
    return jnp.where(segment[0] == KIND_LORA, segment[3], 0)


def gather_rows(
    pool: jax.Array,
    pages: jax.Array,
    first_chunk: jax.Array,
    num_valid: jax.Array,
    *,
    num_rows: int,
    width: int,
) -> jax.Array:
    """Rows of A or B as a dense `[num_rows, width]`; rows from `num_valid` on are zeros.

    Args: pages: i32 `[max_adapter_pages]`, the slot's pages. first_chunk, num_valid: i32 scalars.
    """
    page_chunks, row_chunks = chunks_per_page(pool), chunks_per_row(width)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    chunk = first_chunk + jnp.arange(num_rows * row_chunks, dtype=jnp.int32)
    page = pages.at[chunk // page_chunks].get(mode="fill", fill_value=0)
    chunks = pool.reshape(-1, page_chunks, CHUNK)[page, chunk % page_chunks]
    rows = chunks.reshape(num_rows, row_chunks * CHUNK)[:, :width]
    return jnp.where((row < num_valid)[:, None], rows, jnp.zeros((), rows.dtype))


def tile_rows(tiles: LoraTiles, tile: jax.Array) -> jax.Array:
    """Row indices `[block_rows]` of one tile.

    Places past the tile's end hold T: out of bounds, so that reads fill and writes drop.
    """
    num_tokens = tiles.row_order.shape[0]
    place = tiles.starts[tile] + jnp.arange(tiles.block_rows, dtype=jnp.int32)
    rows = tiles.row_order.at[place].get(mode="fill", fill_value=num_tokens)
    return jnp.where(place < tiles.starts[tile + 1], rows, num_tokens)


def check_rows(x: jax.Array, tiles: LoraTiles) -> None:
    """Raise ValueError unless x has the rows that the tiles order, `[at least T, in]`."""
    num_tokens = tiles.row_order.shape[0]
    if x.ndim != 2 or x.shape[0] < num_tokens:
        raise ValueError(f"x has shape {x.shape}, but tiles order {num_tokens} rows")


def check_out_sizes(modules: tuple[int, ...], out_sizes: tuple[int, ...]) -> None:
    """Raise ValueError unless there is one for each module."""
    if len(out_sizes) != len(modules):
        raise ValueError(f"{len(out_sizes)} out_sizes for {len(modules)} modules")


def check_adapter_tables(slot_pages: jax.Array, tiles: LoraTiles) -> None:
    """Raise ValueError unless the tables have the shapes that `docs/design.md` gives them."""
    num_tiles = tiles.slots.shape[0]
    if tiles.segments.ndim != 4 or tiles.segments.shape[1:] != (num_tiles, NUM_MODULES, 4):
        raise ValueError(
            f"segments has shape {tiles.segments.shape}, "
            f"not [layers, {num_tiles}, {NUM_MODULES}, 4]"
        )
    if slot_pages.ndim != 2:
        raise ValueError(f"slot_pages has shape {slot_pages.shape}, not [slots, pages]")
