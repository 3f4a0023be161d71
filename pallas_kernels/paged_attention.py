"""Attention over the page pool: one query token a sequence (decode), or tiles of them (ragged).

Keys and values are written first and found by absolute position, so that decode, prefill and
chunked prefill mean the same thing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import decode_attention_triton as decode_triton
from pallas_kernels import ragged_attention_mosaic as ragged_mosaic
from pallas_kernels import ragged_attention_triton as ragged_triton
from pallas_kernels.attention_blocks import LOWEST, divide_seen
from pallas_kernels.dispatch import unknown_implementation
from pallas_kernels.tiles import QueryTiles

BLOCK_KV = 128  # positions that the references look at in a step


def _attend(
    q: jax.Array,
    kv_pages: jax.Array,
    pages: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """Softmax attention of B sequences in f32; a query that sees no key gets zeros.

    The softmax runs over blocks of positions, so that the cost follows the longest sequence and
    not the width of the page table.

    Args: q: f32 `[B, Q, K, G, H]`, scaled; G query heads share a kv head. kv_pages:
          `[num_pages, 2, K, page_size, H]`. pages: i32 `[B, pages_per_row]`. positions: i32
          `[B, Q]`, of the queries. lengths: i32 `[B]`, written positions. window: i32 scalar.
    """
    _, _, num_kv_heads, page_size, head_dim = kv_pages.shape
    block_pages = min(pages.shape[1], max(1, BLOCK_KV // page_size))
    block_kv = block_pages * page_size

    def add_block(block: jax.Array, seen: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, highest, total = seen
        column = block * block_pages + jnp.arange(block_pages, dtype=jnp.int32)
        kv = kv_pages[pages.at[:, column].get(mode="fill", fill_value=0)].astype(jnp.float32)
        kv = kv.transpose(2, 0, 3, 1, 4, 5).reshape(2, -1, num_kv_heads, block_kv, head_dim)
        place = block * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
        written = place[None, :] < lengths[:, None]
        # past the sequence lies another's leftover; were it NaN, a zero weight would not cancel it
        values = jnp.where(written[:, None, :, None], kv[1], 0.0)
        distance = positions[:, :, None] - place[None, None, :]
        visible = (distance >= 0) & (distance < window) & written[:, None, :]
        visible = visible[:, :, None, None, :]

        scores = jnp.einsum("bqkgh,bksh->bqkgs", q, kv[0], precision="highest")
        scores = jnp.where(visible, scores, LOWEST)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_highest[..., None]), 0.0)
        kept = jnp.exp(highest - new_highest)
        new = jnp.einsum("bqkgs,bksh->bqkgh", weights, values, precision="highest")
        out = out * kept[..., None] + new
        return out, new_highest, total * kept + jnp.sum(weights, axis=-1)

    highest = jnp.full(q.shape[:-1], LOWEST, jnp.float32)
    nothing = (jnp.zeros_like(q), highest, jnp.zeros_like(highest))
    num_blocks = (jnp.max(lengths) + block_kv - 1) // block_kv
    out, _, total = jax.lax.fori_loop(0, num_blocks, add_block, nothing)
    return divide_seen(out, total[..., None])


def _as_kv_pages(pool: jax.Array, num_kv_heads: int, page_size: int, head_dim: int) -> jax.Array:
    return pool.reshape(-1, 2, num_kv_heads, page_size, head_dim)


def _grouped_queries(q: jax.Array, num_kv_heads: int, scale: float) -> jax.Array:
    """Queries `[T, N, H]` as scaled f32 `[T, K, G, H]`, grouped by the kv head that they share."""
    num_tokens, num_heads, head_dim = q.shape
    q = q.astype(jnp.float32) * scale
    return q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)


def paged_decode_attention_reference(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    rows: jax.Array,
    lengths: jax.Array,
    window: jax.Array,
    *,
    num_kv_heads: int,
    page_size: int,
    scale: float,
) -> jax.Array:
    """The specification of `paged_decode_attention`: all rows at once."""
    out = _attend(
        _grouped_queries(q[: len(rows)], num_kv_heads, scale)[:, None],
        _as_kv_pages(pool, num_kv_heads, page_size, q.shape[2]),
        page_table[rows],
        (lengths - 1)[:, None],
        lengths,
        window,
    )
    out = out.reshape(-1, *q.shape[1:]).astype(q.dtype)
    return jnp.pad(out, ((0, len(q) - len(rows)), (0, 0), (0, 0)))


def paged_ragged_attention_reference(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    tiles: QueryTiles,
    window: jax.Array,
    base: jax.Array | None = None,
    *,
    num_kv_heads: int,
    page_size: int,
    scale: float,
) -> jax.Array:
    """The specification of `paged_ragged_attention`: tile by tile."""
    base = jnp.zeros_like(q) if base is None else base
    num_tokens, num_heads, head_dim = q.shape
    kv_pages = _as_kv_pages(pool, num_kv_heads, page_size, head_dim)
    grouped = _grouped_queries(q, num_kv_heads, scale)
    place = jnp.arange(tiles.block_q, dtype=jnp.int32)

    def attend_tile(tile: jax.Array, out: jax.Array) -> jax.Array:
        tokens = jnp.where(place < tiles.q_len[tile], tiles.q_start[tile] + place, num_tokens)
        attended = _attend(
            grouped.at[tokens].get(mode="fill", fill_value=0)[None],
            kv_pages,
            page_table[tiles.row[tile]][None],
            (tiles.position[tile] + place)[None],
            (tiles.position[tile] + tiles.q_len[tile])[None],
            window,
        )
        attended = attended.reshape(tiles.block_q, num_heads, head_dim).astype(q.dtype)
        return out.at[tokens].set(attended, mode="drop")

    out: jax.Array = jax.lax.fori_loop(0, tiles.num_tiles[0], attend_tile, base)
    return out


def _check_shapes(q: jax.Array, pool: jax.Array, num_kv_heads: int, page_size: int) -> None:
    if q.ndim != 3 or q.shape[1] % num_kv_heads:
        raise ValueError(f"q has shape {q.shape}, not [T, a multiple of {num_kv_heads} heads, H]")
    page_elems = 2 * num_kv_heads * page_size * q.shape[2]
    if pool.ndim != 2 or pool.shape[1] != page_elems:
        raise ValueError(f"pool has shape {pool.shape}, not [num_pages, {page_elems}]")


def paged_decode_attention(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    rows: jax.Array,
    lengths: jax.Array,
    window: jax.Array,
    *,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    implementation: str,
    config: decode_triton.Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one query token a sequence over its pages.

    Semantics: out[t] = softmax(scale * q[t] . k[p]) . v[p] over the positions p < lengths[t] with
               lengths[t] - 1 - p < window, found in pages page_table[rows[t], p // page_size].
    Args:      q: `[T, N, H]`. pool: `[num_pages, 2 * K * page_size * H]`.
               page_table: i32 `[num_rows, pages_per_row]`. rows, lengths: i32 `[B]` of the first
               B <= T tokens; length 0 marks padding. window: i32 scalar.
    Returns:   `[T, N, H]` of q's dtype; zeros where the length is 0. Undefined from token B on, and
               if B < T from the last row on that has a length.
    Raises:    ValueError: shapes disagree or the implementation is unknown.
    Source:    Flash-Decoding (Dao et al., 2023); PagedAttention (arXiv:2309.06180).
    """
    _check_shapes(q, pool, num_kv_heads, page_size)
    if rows.shape != lengths.shape or len(rows) > len(q):
        raise ValueError(f"rows {rows.shape}, lengths {lengths.shape} and q {q.shape} disagree")
    if implementation == "xla":
        return paged_decode_attention_reference(
            q,
            pool,
            page_table,
            rows,
            lengths,
            window,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            scale=scale,
        )
    if implementation == "triton":
        return decode_triton.decode_attention_triton(
            q,
            pool,
            page_table,
            rows,
            lengths,
            window,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            scale=scale,
            config=config,
            interpret=interpret,
        )
    raise unknown_implementation(implementation)


def paged_ragged_attention(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    tiles: QueryTiles,
    window: jax.Array,
    base: jax.Array | None = None,
    *,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    implementation: str,
    config: ragged_triton.Config | ragged_mosaic.Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of tiles of query tokens over the pages of their sequences.

    Semantics: the token at place i of tile g has position P = position[g] + i and attends to the
               positions p <= P with P - p < window of sequence row[g].
    Args:      as `paged_decode_attention`; tiles say which tokens are of which sequence, and where.
               base: `[T, N, H]` of q's dtype, what tokens in no tile get; None: zeros.
    Returns:   `[T, N, H]` of q's dtype.
    Raises:    ValueError: shapes disagree or the implementation is unknown.
    Source:    FlashAttention-2 (arXiv:2307.08691); PagedAttention (arXiv:2309.06180).
    """
    _check_shapes(q, pool, num_kv_heads, page_size)
    if base is not None and (base.shape, base.dtype) != (q.shape, q.dtype):
        raise ValueError(f"base is {base.dtype} {base.shape}, but q is {q.dtype} {q.shape}")
    if implementation == "xla":
        return paged_ragged_attention_reference(
            q,
            pool,
            page_table,
            tiles,
            window,
            base,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            scale=scale,
        )
    if implementation == "triton":
        assert not isinstance(config, ragged_mosaic.Config)
        return ragged_triton.ragged_attention_triton(
            q,
            pool,
            page_table,
            tiles,
            window,
            base,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            scale=scale,
            config=config,
            interpret=interpret,
        )
    if implementation == "mosaic":
        assert not isinstance(config, ragged_triton.Config)
        return ragged_mosaic.ragged_attention_mosaic(
            q,
            pool,
            page_table,
            tiles,
            window,
            base,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            scale=scale,
            config=config,
            interpret=interpret,
        )
    raise unknown_implementation(implementation)
