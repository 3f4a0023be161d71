"""KV write: put each token's key and value into its place in the page pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import unknown_implementation


def kv_write_reference(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    page_size: int,
) -> jax.Array:
    """The specification of `kv_write`: one scatter into the pool seen as KV pages."""
    num_kv_heads, head_dim = k.shape[1:]
    paged = pool.reshape(-1, 2, num_kv_heads, page_size, head_dim)
    kv = jnp.stack([k, v], axis=1).astype(pool.dtype)
    return paged.at[pages, :, :, offsets].set(kv).reshape(pool.shape)


def kv_write(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    page_size: int,
    implementation: str,
) -> jax.Array:
    """Write the keys and values of a step into their pages; in place when the pool is donated.

    Semantics: page[pages[t]][0, :, offsets[t]] = k[t];  page[pages[t]][1, :, offsets[t]] = v[t].
    Args:      pool: `[num_pages, 2 * K * page_size * H]`. k, v: `[T, K, H]`, cast to its dtype.
               pages, offsets: i32 `[T]`; padding tokens carry page 0, whose content is
               undefined; no other place is written twice.
    Returns:   the pool.
    Raises:    ValueError: shapes disagree or the implementation is unknown.
    Cost:      writes T * 2 * K * H elements.
    """
    if k.shape != v.shape or k.ndim != 3 or not pages.shape == offsets.shape == k.shape[:1]:
        raise ValueError(
            f"k {k.shape}, v {v.shape}, pages {pages.shape} and offsets {offsets.shape} disagree"
        )
    page_elems = 2 * page_size * k.shape[1] * k.shape[2]
    if pool.ndim != 2 or pool.shape[1] != page_elems:
        raise ValueError(f"pool has shape {pool.shape}, not [num_pages, {page_elems}]")
    if implementation == "xla":
        return kv_write_reference(pool, k, v, pages, offsets, page_size=page_size)
    raise unknown_implementation(implementation)
