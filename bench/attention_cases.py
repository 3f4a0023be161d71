"""Batches that the attention benchmark and tuner run, on random pages, with what they must cost.

A batch comes as several inputs over one pool, each with its own pages: rotating over them keeps
caches as cold as in a step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.floors import Peaks
from pallas_kernels.paged_attention import paged_decode_attention, paged_ragged_attention
from pallas_kernels.shapes import MODELS, ModelShape
from pallas_kernels.tiles import QueryTiles

COLD_BYTES = 300e6  # that a rotation reads at least: several times the last-level cache
MAX_INPUTS = 16
UNLIMITED = 2**31 - 1
BLOCK_PAGES = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's attention: single-token rows of these contexts, then chunks behind prefixes."""

    name: str
    model: str
    contexts: tuple[int, ...] = ()  # of the single-token rows, their own token included
    chunks: tuple[tuple[int, int], ...] = ()  # (cached prefix, new tokens)
    num_padding: int = 0  # rows beyond the batch, as a bucket has them
    max_length: int | None = None  # that a row's page table has room for; None: the longest row

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model]

    @property
    def ends(self) -> list[int]:
        return [*self.contexts, *(prefix + new for prefix, new in self.chunks)]

    @property
    def num_tokens(self) -> int:
        return len(self.contexts) + self.num_padding + sum(new for _, new in self.chunks)

    @property
    def kv_bytes(self) -> int:
        """Of all keys and values that the batch reads, each once."""
        return sum(self.ends) * 2 * self.shape.num_kv_heads * self.shape.head_dim * 2

    def floor_s(self, peaks: Peaks) -> float:
        """Rows cost their bytes, chunks their operations (or bytes)."""
        token_bytes = 2 * self.shape.num_kv_heads * self.shape.head_dim * 2
        floor = peaks.floor_s(sum(self.contexts) * token_bytes)
        for prefix, new in self.chunks:
            pairs = new * prefix + new * (new + 1) / 2
            flops = 4 * pairs * self.shape.num_heads * self.shape.head_dim
            floor += peaks.floor_s((prefix + new) * token_bytes, flops)
        return floor


def query_tiles(batch: Batch, block_q: int) -> QueryTiles:
    """Tiles of the chunks, as the engine packs them: the dearest first."""
    tiles, token = [], len(batch.contexts)
    for row, (prefix, new) in enumerate(batch.chunks, start=len(batch.contexts)):
        for begin in range(0, new, block_q):
            tiles.append((row, token + begin, min(block_q, new - begin), prefix + begin))
        token += new
    tiles.sort(key=lambda tile: tile[2] + tile[3], reverse=True)
    num_tiles = len(tiles)
    tiles += [(0, 0, 0, 0)] * batch.num_padding  # a bucket has room for short chunks
    rows, q_start, q_len, position = (jnp.array(c, jnp.int32) for c in zip(*tiles, strict=True))
    return QueryTiles(
        row=rows, q_start=q_start, q_len=q_len, position=position,
        num_tiles=jnp.array([num_tiles], jnp.int32), block_q=block_q,
    )  # fmt: skip


def cold_inputs(batch: Batch) -> int:
    """How many inputs to rotate over."""
    return int(np.clip(np.ceil(COLD_BYTES / batch.kv_bytes), 2, MAX_INPUTS))


def random_pool(num_pages: int, page_elems: int) -> jax.Array:
    """Normal values, bf16 [num_pages, page_elems]; those of a block of pages come again and again,
    so that tens of gigabytes are made at once and without as many of random bits beside them.
    """
    block = jax.random.normal(jax.random.key(0), (min(num_pages, BLOCK_PAGES), page_elems))
    page = jnp.arange(num_pages, dtype=jnp.int32) % len(block)
    pool: jax.Array = jax.jit(lambda block: block.astype(jnp.bfloat16)[page])(block)
    return pool


def make_inputs(
    batch: Batch,
    block_q: int,
    *,
    num_inputs: int | None = None,
    num_pages: int = 0,
    pool: jax.Array | None = None,
) -> tuple[list[Any], tuple[Any, ...]]:
    """(inputs to rotate: q and page table; what they share) for `attend`.

    Pages come from a pool of their own, of at least `num_pages`, so that batches can share a
    compiled program. From a `pool` that is given they are taken in turns: where it is too small for
    all inputs, a page comes again in a later one.
    """
    shape, page_size = batch.shape, batch.shape.page_size
    num_inputs = num_inputs or cold_inputs(batch)
    needed = [-(-end // page_size) for end in batch.ends]
    if pool is None:
        pool = random_pool(max(num_pages, num_inputs * sum(needed) + 1), shape.page_elems)
    elif len(pool) <= sum(needed):
        raise ValueError(f"pool: got {len(pool)} pages, allowed: above {sum(needed)}, one input's")
    order = np.random.default_rng(0).permutation(np.arange(1, len(pool), dtype=np.int32))
    width = -(-(batch.max_length or max(batch.ends)) // page_size)
    inputs = []
    for i in range(num_inputs):
        places = np.arange(i * sum(needed), (i + 1) * sum(needed))
        pages = np.split(order.take(places, mode="wrap"), np.cumsum(needed)[:-1])
        table = np.zeros((len(needed) + 1, width), np.int32)
        for row, of_row in enumerate(pages):
            table[row, : len(of_row)] = of_row
        size = (batch.num_tokens, shape.num_heads, shape.head_dim)
        q = jax.random.normal(jax.random.key(i + 1), size, jnp.bfloat16)
        inputs.append((q, jnp.asarray(table)))
    singles = np.zeros(len(batch.contexts) + batch.num_padding, np.int32)
    singles[: len(batch.contexts)] = batch.contexts
    rows = jnp.minimum(jnp.arange(len(singles), dtype=jnp.int32), len(needed))
    tiles = query_tiles(batch, block_q) if batch.chunks else None
    return inputs, (pool, rows, jnp.asarray(singles), tiles)


def attend(
    q: jax.Array,
    page_table: jax.Array,
    pool: jax.Array,
    rows: jax.Array,
    lengths: jax.Array,
    tiles: QueryTiles | None,
    *,
    shape: ModelShape,
    decode: dict[str, Any],
    ragged: dict[str, Any],
) -> jax.Array:
    """A step's attention as the model calls it; `decode` and `ragged` are further keywords."""
    keywords: dict[str, Any] = {
        "num_kv_heads": shape.num_kv_heads,
        "page_size": shape.page_size,
        "scale": shape.head_dim**-0.5,
    }
    window, base = jnp.int32(UNLIMITED), None
    if len(rows):
        base = paged_decode_attention(
            q, pool, page_table, rows, lengths, window, **keywords, **decode
        )
        if tiles is None:
            return base
    assert tiles is not None
    return paged_ragged_attention(q, pool, page_table, tiles, window, base, **keywords, **ragged)
