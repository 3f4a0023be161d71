"""Adapters that exist on the device only, and batches over them, for timing the LoRA kernels.

Pages hold arbitrary small numbers: a kernel's time depends on where it reads, not on what.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.adapter_layout import CHUNK, KIND_LORA, NUM_MODULES, chunks_per_row
from pallas_kernels.shapes import ModelShape
from pallas_kernels.tiles import LoraTiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """Slots 1 to the number of ranks, slot s of rank `ranks[s - 1]` on all of `modules`.

    Layers come round again: layer l reads what layer `l % num_sets` reads.
    """

    shape: ModelShape
    ranks: tuple[int, ...]
    modules: tuple[int, ...]
    num_pages: int  # the pages that slots name are below it
    slot_pages: np.ndarray  # i32 [S, pages]
    segments: np.ndarray  # i32 [L, S, 7, 4]

    def num_bytes(self, slots: Sequence[int] | np.ndarray, modules: Sequence[int]) -> int:
        """Bytes of A and B that a layer must read, each adapter once."""
        sizes = [sum(self.shape.module_sizes(module)) for module in modules]
        used = {int(slot) for slot in slots if slot}
        return sum(2 * self.ranks[slot - 1] * size for slot in used for size in sizes)


def make_adapters(
    shape: ModelShape,
    ranks: Sequence[int],
    modules: Sequence[int],
    *,
    num_layers: int,
    num_sets: int,
) -> Adapters:
    """Adapters in a pool that holds nothing else, their pages in random order.

    One pool stands for the pools of all layers: an adapter's run holds `num_sets` layers.
    """
    segments = np.zeros((num_sets, len(ranks) + 1, NUM_MODULES, 4), np.int32)
    page_chunks = shape.page_elems // CHUNK
    num_pages = []
    for slot, rank in enumerate(ranks, start=1):
        chunk = 0
        for layer, module in itertools.product(range(num_sets), modules):
            size_in, size_out = shape.module_sizes(module)
            b_chunk = chunk + rank * chunks_per_row(size_in)
            segments[layer, slot, module] = (KIND_LORA, chunk, b_chunk, rank)
            chunk = b_chunk + rank * chunks_per_row(size_out)
        num_pages.append(-(-chunk // page_chunks))
    pages = np.random.default_rng(0).permutation(np.arange(1, sum(num_pages) + 1))
    slot_pages = np.zeros((len(ranks) + 1, max(num_pages)), np.int32)
    taken = 0
    for slot, count in enumerate(num_pages, start=1):
        slot_pages[slot, :count] = pages[taken : taken + count]
        taken += count
    return Adapters(
        shape=shape,
        ranks=tuple(ranks),
        modules=tuple(modules),
        num_pages=taken + 1,
        slot_pages=slot_pages,
        segments=segments[np.arange(num_layers) % num_sets],
    )


def common_tables(worlds: Sequence[Adapters]) -> tuple[int, list[np.ndarray]]:
    """Pages of a pool for any of them, and their tables padded to one shape: for one program."""
    tables = [adapters.slot_pages for adapters in worlds]
    num_slots = max(table.shape[0] for table in tables)
    width = max(table.shape[1] for table in tables)
    padded = [
        np.pad(table, ((0, num_slots - table.shape[0]), (0, width - table.shape[1])))
        for table in tables
    ]
    return max(adapters.num_pages for adapters in worlds), padded


def fill_pool(num_pages: int, page_elems: int) -> jax.Array:
    """A bfloat16 pool of arbitrary small numbers."""

    def fill() -> jax.Array:
        page = jax.lax.broadcasted_iota(jnp.int32, (num_pages, page_elems), 0)
        place = jax.lax.broadcasted_iota(jnp.int32, (num_pages, page_elems), 1)
        number = (page * 104729 + place * 7919) % 1021 - 510
        return (number.astype(jnp.float32) * 1e-5).astype(jnp.bfloat16)

    pool: jax.Array = jax.jit(fill)()
    return pool


def cut_tiles(
    slots: np.ndarray, adapters: Adapters, *, block_rows: int, capacity: int
) -> LoraTiles:
    """The tiles of a batch, cut as a step cuts them."""
    rows: list[int] = []
    starts, tile_slots = [0], list[int]()
    used = np.unique(slots[slots > 0])
    for slot in sorted(used, key=lambda slot: (-adapters.ranks[slot - 1], slot)):
        (of_slot,) = np.nonzero(slots == slot)
        for first in range(0, len(of_slot), block_rows):
            rows.extend(of_slot[first : first + block_rows])
            starts.append(len(rows))
            tile_slots.append(int(slot))
    num_tiles = len(tile_slots)
    rows.extend(np.flatnonzero(slots == 0))
    starts.extend([starts[-1]] * (capacity - num_tiles))
    tile_slots.extend([0] * (capacity - num_tiles))
    return LoraTiles(
        row_order=jnp.asarray(rows, jnp.int32),
        starts=jnp.asarray(starts, jnp.int32),
        slots=jnp.asarray(tile_slots, jnp.int32),
        segments=jnp.asarray(adapters.segments[:, tile_slots]),
        num_tiles=jnp.asarray([num_tiles], jnp.int32),
        block_rows=block_rows,
    )
