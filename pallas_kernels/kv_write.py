"""KV write: put each token's key and value into its place in the page pool."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.dispatch import unknown_implementation
from pallas_kernels.triton_blocks import Ref, next_power_of_2, triton_call


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
    if len(pages) == 1:  # XLA would make a lone update a slice update, and on CPU copy the pool
        k, v, pages, offsets = (jnp.repeat(a, 2, axis=0) for a in (k, v, pages, offsets))
    paged = pool.reshape(-1, 2, num_kv_heads, page_size, head_dim)
    kv = jnp.stack([k, v], axis=1).astype(pool.dtype)
    return paged.at[pages, :, :, offsets].set(kv).reshape(pool.shape)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one program of the Triton kernel works; it owns one token."""

    num_warps: int = 4


def _kernel(
    _: Ref,
    k_ref: Ref,
    v_ref: Ref,
    pages_ref: Ref,
    offsets_ref: Ref,
    pool_ref: Ref,
    *,
    page_size: int,
) -> None:
    token = pl.program_id(0)
    page, offset = pages_ref[token], offsets_ref[token]
    num_kv_heads, head_dim = k_ref.shape[1:]
    shape = (next_power_of_2(num_kv_heads), next_power_of_2(head_dim))
    head = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = (head < num_kv_heads) & (lane < head_dim)

    @pl.when(page != 0)  # padding would race for the null page
    def write() -> None:
        for which, ref in enumerate((k_ref, v_ref)):
            new = pltriton.load(ref.at[jnp.full_like(head, token), head, lane], mask=mask, other=0)
            place = ((which * num_kv_heads + head) * page_size + offset) * head_dim + lane
            out = pool_ref.at[jnp.full_like(head, page), place]
            pltriton.store(out, new.astype(pool_ref.dtype), mask=mask)


def _kv_write_triton(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    page_size: int,
    config: Config,
    interpret: bool,
) -> jax.Array:
    written: jax.Array = triton_call(
        functools.partial(_kernel, page_size=page_size),
        jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        name="kv_write",
        grid=(k.shape[0],),
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
        aliases={0: 0},
    )(pool, k, v, pages, offsets)
    return written


def kv_write(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    page_size: int,
    implementation: str,
    config: Config | None = None,
    interpret: bool = False,
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
    if implementation == "triton":
        return _kv_write_triton(
            pool,
            k,
            v,
            pages,
            offsets,
            page_size=page_size,
            config=config or Config(),
            interpret=interpret,
        )
    raise unknown_implementation(implementation)
