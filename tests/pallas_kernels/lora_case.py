"""Random LoRA batches and their float64 answers, written as plain loops.

Nothing here comes from the code under test: the packer writes chunks one by one as `docs/design.md`
words it, and everything that an adapter does not own is NaN, so that a stray read shows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from pallas_kernels.tiles import LoraTiles

CHUNK = 128
MIXED = {1: {0: 8, 1: 4, 2: 64}, 2: {0: 12, 2: 24}, 3: {1: 16}, 4: {0: 32, 1: 32, 2: 32}}


@functools.cache
def compiled(op: Any, **keywords: Any) -> Any:
    """The op with these keywords; cases of one shape share its compilation."""
    interpret = keywords["implementation"] == "triton"
    return jax.jit(functools.partial(op, interpret=interpret, **keywords))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraCase:
    """One batch over one layer's pool. `a[slot][module]` and `b[slot][module]` are float64."""

    x: np.ndarray  # [T, in]
    pool: np.ndarray  # [num_pages, page_elems]
    slot_pages: np.ndarray
    layer: int
    tiles: LoraTiles
    row_slots: np.ndarray  # [T]; 0 = base row
    a: dict[int, dict[int, np.ndarray]]
    b: dict[int, dict[int, np.ndarray]]
    ranks: dict[int, dict[int, int]]

    def shrunk(self, modules: tuple[int, ...]) -> dict[tuple[int, int], np.ndarray]:
        """Oracle of shrink: (row, place in modules) -> v[row, place, :rows of A]."""
        answers = {}
        for row, slot in enumerate(self.row_slots):
            for i, module in enumerate(modules):
                if module in self.a.get(int(slot), {}):
                    lora_a = self.a[int(slot)][module]
                    x_row = self.x[row].astype(np.float64)
                    answers[row, i] = np.array([float(np.dot(x_row, a_row)) for a_row in lora_a])
        return answers

    def expanded(
        self,
        base: np.ndarray,
        v: np.ndarray,
        modules: tuple[int, ...],
        out_sizes: tuple[int, ...],
        column_offset: int,
    ) -> np.ndarray:
        """Oracle of expand, in float64."""
        y = base.astype(np.float64)
        for row, slot in enumerate(self.row_slots):
            column = column_offset
            for i, (module, out_size) in enumerate(zip(modules, out_sizes, strict=True)):
                if module in self.b.get(int(slot), {}):
                    for k, b_row in enumerate(self.b[int(slot)][module]):
                        y[row, column : column + out_size] += float(v[row, i, k]) * b_row
                column += out_size
        return y

    def deltas(
        self, modules: tuple[int, ...], out_sizes: tuple[int, ...], num_ranks: int
    ) -> np.ndarray:
        """Oracle of what adapters add to rows: shrunk and expanded in float64."""
        v = np.zeros((len(self.row_slots), len(modules), num_ranks))
        for (row, place), shrunk in self.shrunk(modules).items():
            v[row, place, : len(shrunk)] = shrunk
        nothing = np.zeros((len(self.row_slots), sum(out_sizes)))
        return self.expanded(nothing, v, modules, out_sizes, 0)


def make_tiles(
    row_slots: np.ndarray,
    segments: np.ndarray,
    block_rows: int,
    capacity: int,
    rng: np.random.Generator,
) -> LoraTiles:
    """Group the rows of each slot, slots in random order, and cut them to at most block_rows."""
    order: list[int] = []
    starts, slots = [0], []
    for slot in rng.permutation(np.unique(row_slots[row_slots != 0])):
        rows = rng.permutation(np.flatnonzero(row_slots == slot))
        for first in range(0, len(rows), block_rows):
            order.extend(int(row) for row in rows[first : first + block_rows])
            starts.append(len(order))
            slots.append(int(slot))
    num_tiles = len(slots)
    assert num_tiles <= capacity
    order += [int(row) for row in np.flatnonzero(row_slots == 0)]
    starts += [starts[-1]] * (capacity - num_tiles)
    slots += [0] * (capacity - num_tiles)
    return LoraTiles(
        row_order=_i32(order),
        starts=_i32(starts),
        slots=_i32(slots),
        segments=_i32(segments[:, slots]),
        num_tiles=_i32([num_tiles]),
        block_rows=block_rows,
    )


def make_case(
    *,
    row_slots: np.ndarray,
    ranks: dict[int, dict[int, int]],
    in_size: int,
    out_size: dict[int, int],
    page_elems: int,
    block_rows: int,
    dtype: Any,
    seed: int,
    rank_split: int = 1,
    num_layers: int = 2,
    spare_tiles: int = 2,
) -> LoraCase:
    """A batch whose row t belongs to slot row_slots[t]; `ranks[slot][module]` as slots hold it."""
    rng = np.random.default_rng(seed)
    layer = int(rng.integers(num_layers))
    num_slots = max(ranks, default=0) + 1
    page_chunks = page_elems // CHUNK
    segments = np.zeros((num_layers, num_slots, 7, 4), np.int32)
    segments[:, 1:] = rng.integers(0, 2, size=(num_layers, num_slots - 1, 7, 4))
    segments[layer] = 0
    a: dict[int, dict[int, np.ndarray]] = {}
    b: dict[int, dict[int, np.ndarray]] = {}
    streams: dict[int, list[np.ndarray]] = {}
    for slot, modules in ranks.items():
        a[slot], b[slot] = {}, {}
        # a run need not start at the edge of a page
        stream = [np.full(CHUNK, np.nan)] * int(rng.integers(0, 3))
        for module in sorted(modules):
            rank = modules[module]
            a[slot][module] = _rounded(rng.normal(size=(-(-rank // rank_split), in_size)), dtype)
            b[slot][module] = _rounded(rng.normal(size=(rank, out_size[module])), dtype)
            a_chunk = len(stream)
            stream += _row_chunks(a[slot][module])
            segments[layer, slot, module] = (1, a_chunk, len(stream), rank)
            stream += _row_chunks(b[slot][module])
        streams[slot] = stream
    needed = {slot: -(-len(stream) // page_chunks) for slot, stream in streams.items()}
    max_pages = max(needed.values(), default=1)
    free = [int(page) for page in rng.permutation(np.arange(1, sum(needed.values()) + 3))]
    pool = np.full((len(free) + 1, page_elems), np.nan, dtype)
    slot_pages = np.zeros((num_slots, max_pages), np.int32)
    for slot, stream in streams.items():
        for place in range(needed[slot]):
            slot_pages[slot, place] = free.pop()
        for c, chunk in enumerate(stream):
            offset = (c % page_chunks) * CHUNK
            pool[slot_pages[slot, c // page_chunks], offset : offset + CHUNK] = chunk.astype(dtype)
    capacity = len(row_slots) + spare_tiles
    x = rng.normal(size=(len(row_slots), in_size)).astype(dtype)
    x[row_slots == 0] = np.nan
    return LoraCase(
        x=x,
        pool=pool,
        slot_pages=slot_pages,
        layer=layer,
        tiles=make_tiles(row_slots, segments, block_rows, capacity, rng),
        row_slots=row_slots,
        a=a,
        b=b,
        ranks=ranks,
    )


def _row_chunks(rows: np.ndarray) -> list[np.ndarray]:
    padded = np.zeros((rows.shape[0], -(-rows.shape[1] // CHUNK) * CHUNK))
    padded[:, : rows.shape[1]] = rows
    return list(padded.reshape(-1, CHUNK))


def _rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Float64 values that `dtype` holds exactly."""
    return values.astype(dtype).astype(np.float64)


def _i32(values: Any) -> Any:
    return np.asarray(values, np.int32)
