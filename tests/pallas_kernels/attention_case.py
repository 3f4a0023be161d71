"""Random paged contexts and their float64 answers, written as plain loops.

Every place of the pool that no written position occupies is NaN, so that a stray read shows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pallas_kernels.tiles import QueryTiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedContexts:
    """Sequences in a pool: `keys[row]`, `values[row]` are float64 `[length, K, H]`."""

    pool: np.ndarray
    page_table: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    page_size: int

    def attention(self, q: np.ndarray, row: int, position: int, window: int, scale: float) -> Any:
        """Oracle for one query token `[N, H]` at `position` of sequence `row`."""
        num_heads, head_dim = q.shape
        group = num_heads // self.keys[row].shape[1]
        out = np.zeros((num_heads, head_dim))
        for head in range(num_heads):
            scores, values = [], []
            for p in range(position + 1):
                if position - p < window:
                    key = self.keys[row][p, head // group]
                    scores.append(scale * float(np.dot(q[head].astype(np.float64), key)))
                    values.append(self.values[row][p, head // group])
            weights = np.exp(np.array(scores) - max(scores))
            out[head] = (weights / weights.sum()) @ np.array(values)
        return out


def make_contexts(
    *,
    lengths: list[int],
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: Any,
    seed: int,
    pages_per_row: int | None = None,
) -> PagedContexts:
    """Sequences of these lengths on random pages; row numbers are the places in `lengths`."""
    rng = np.random.default_rng(seed)
    needed = [-(-length // page_size) for length in lengths]
    num_pages = sum(needed) + 2
    free = [int(page) for page in rng.permutation(np.arange(1, num_pages))]
    pool = np.full((num_pages, 2, num_kv_heads, page_size, head_dim), np.nan, dtype)
    page_table = np.zeros((len(lengths), pages_per_row or max(*needed, 1)), np.int32)
    keys, values = [], []
    for row, length in enumerate(lengths):
        kv = rng.normal(size=(2, length, num_kv_heads, head_dim)).astype(dtype)
        for place in range(needed[row]):
            page_table[row, place] = free.pop()
        for p in range(length):
            pool[page_table[row, p // page_size], :, :, p % page_size] = kv[:, p]
        keys.append(kv[0].astype(np.float64))
        values.append(kv[1].astype(np.float64))
    return PagedContexts(
        pool=pool.reshape(num_pages, -1),
        page_table=page_table,
        keys=keys,
        values=values,
        page_size=page_size,
    )


def make_query_tiles(
    spans: list[tuple[int, int, int]], *, block_q: int, capacity: int
) -> tuple[QueryTiles, list[tuple[int, int] | None]]:
    """Tiles of `(row, position, count)` spans packed one after the other.

    Also says of every token which row and position it is; None stands for a token in no tile.
    """
    table: list[tuple[int, int, int, int]] = []  # row, q_start, q_len, position
    tokens: list[tuple[int, int] | None] = []
    for row, position, count in spans:
        for done in range(0, count, block_q):
            size = min(block_q, count - done)
            table.append((row, len(tokens), size, position + done))
            tokens += [(row, position + done + i) for i in range(size)]
    assert len(table) <= capacity
    num_tiles = len(table)
    table += [(0, 0, 0, 0)] * (capacity - num_tiles)
    row, q_start, q_len, position = (
        np.array(column, np.int32) for column in zip(*table, strict=True)
    )
    tiles = QueryTiles(
        row=row,
        q_start=q_start,
        q_len=q_len,
        position=position,
        num_tiles=np.array([num_tiles], np.int32),
        block_q=block_q,
    )
    return tiles, tokens
