"""From the fused qkv product to rotated queries, and rotated keys and values in their pages."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.add_norm import add_lora, check_lora, rms_norm
from pallas_kernels.dispatch import unknown_implementation
from pallas_kernels.triton_blocks import Ref, next_power_of_2, triton_call


class HeadNorms(NamedTuple):
    """Weights `[head_dim]` of the norms over each head of q and k (Qwen3)."""

    q: jax.Array
    k: jax.Array


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x `[T, heads, head_dim]` (halves convention, as Hugging Face stores q and k)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def write_pages(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    page_size: int,
) -> jax.Array:
    """The pool with k, v `[T, K, H]` in place: one scatter into the pool seen as KV pages."""
    num_kv_heads, head_dim = k.shape[1:]
    if len(pages) == 1:
        # XLA makes a slice update of one token's scatter, and copies the pool around it; of two
        # (the second is padding) it does not.
        k, v, pages, offsets = (
            jnp.concatenate([x, jnp.zeros_like(x)]) for x in (k, v, pages, offsets)
        )
    paged = pool.reshape(-1, 2, num_kv_heads, page_size, head_dim)
    kv = jnp.stack([k, v], axis=1).astype(pool.dtype)
    return paged.at[pages, :, :, offsets].set(kv).reshape(pool.shape)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """How the columns of the qkv product divide into heads, and where tokens lie in a page."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int

    @property
    def width(self) -> int:
        """Columns of the qkv product."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def rope_write_reference(
    qkv: jax.Array,
    pool: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    norms: HeadNorms | None,
    lora: jax.Array | None,
    *,
    shape: HeadShape,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """The specification of `rope_write`."""
    qkv = add_lora(qkv, lora)
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    q, k, v = jnp.split(qkv, [q_size, q_size + kv_size], axis=1)
    q = q.reshape(-1, shape.num_heads, shape.head_dim)
    k = k.reshape(-1, shape.num_kv_heads, shape.head_dim)
    v = v.reshape(-1, shape.num_kv_heads, shape.head_dim)
    if norms is not None:
        q, k = rms_norm(q, norms.q, eps), rms_norm(k, norms.k, eps)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, write_pages(pool, k, v, pages, offsets, page_size=shape.page_size)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a program of the Triton kernel works; it owns a token and a block of q, k or v heads."""

    block_heads: int = 8
    num_warps: int = 2


class _Block(NamedTuple):
    """The heads that one program owns, and where their halves lie."""

    token: jax.Array
    head: jax.Array  # [heads, 1], of its part
    lane: jax.Array  # [1, half of head_dim, padded]
    mask: jax.Array  # [heads, lanes]

    def columns(self, half: int, first_head: int, shape: HeadShape) -> jax.Array:
        """Columns in the qkv product of one half of the heads, where its part starts at a head."""
        lane = self.lane + half * (shape.head_dim // 2)
        return (first_head + self.head) * shape.head_dim + lane


def _kernel(
    qkv_ref: Ref,
    _: Ref,
    cos_ref: Ref,
    sin_ref: Ref,
    pages_ref: Ref,
    offsets_ref: Ref,
    norms: HeadNorms | None,  # of references
    lora_ref: Ref | None,
    q_ref: Ref,
    pool_ref: Ref,
    *,
    shape: HeadShape,
    config: Config,
    eps: float,
) -> None:
    token, block = pl.program_id(0), pl.program_id(1)
    q_blocks, kv_blocks = _head_blocks(shape, config)
    page, offset = pages_ref[token], offsets_ref[token]

    def heads(first_block: int, num_heads: int) -> _Block:
        lanes = (config.block_heads, next_power_of_2(shape.head_dim // 2))
        head = jax.lax.broadcasted_iota(jnp.int32, lanes, 0)
        head = head + (block - first_block) * config.block_heads
        lane = jax.lax.broadcasted_iota(jnp.int32, lanes, 1)
        return _Block(token, head, lane, (head < num_heads) & (lane < shape.head_dim // 2))

    def load_half(part: _Block, first_head: int, half: int) -> jax.Array:
        where = (jnp.full_like(part.head, token), part.columns(half, first_head, shape))
        base: jax.Array = pltriton.load(qkv_ref.at[where], mask=part.mask, other=0)
        if lora_ref is None:
            return base
        mask = part.mask & (token < lora_ref.shape[0])
        return add_lora(base, pltriton.load(lora_ref.at[where], mask=mask, other=0))

    def load(part: _Block, first_head: int) -> tuple[jax.Array, jax.Array]:
        return load_half(part, first_head, 0), load_half(part, first_head, 1)

    def turn(part: _Block, first_head: int, norm_ref: Ref | None) -> tuple[jax.Array, jax.Array]:
        halves = load(part, first_head)
        dtype = halves[0].dtype
        if norm_ref is not None:
            halves = _norm_heads(halves, part, norm_ref, shape.head_dim, eps)
        first, second = (half.astype(jnp.float32) for half in halves)
        where = (jnp.full_like(part.lane, token), part.lane)
        cos = pltriton.load(cos_ref.at[where], mask=part.mask, other=0)
        sin = pltriton.load(sin_ref.at[where], mask=part.mask, other=0)
        turned = first * cos - second * sin, second * cos + first * sin
        return turned[0].astype(dtype), turned[1].astype(dtype)

    def write(part: _Block, which: int, halves: tuple[jax.Array, jax.Array]) -> None:
        first = (which * shape.num_kv_heads + part.head) * shape.page_size + offset
        for half, value in enumerate(halves):
            place = first * shape.head_dim + half * (shape.head_dim // 2) + part.lane
            out = pool_ref.at[jnp.full_like(part.head, page), place]
            pltriton.store(out, value.astype(pool_ref.dtype), mask=part.mask)

    @pl.when(block < q_blocks)
    def turn_q() -> None:
        part = heads(0, shape.num_heads)
        for half, value in enumerate(turn(part, 0, norms and norms.q)):
            lane = part.lane + half * (shape.head_dim // 2)
            out = q_ref.at[jnp.full_like(part.head, token), part.head, lane]
            pltriton.store(out, value, mask=part.mask)

    is_real = page != 0  # padding would race for the null page

    @pl.when(is_real & (block >= q_blocks) & (block < q_blocks + kv_blocks))
    def write_k() -> None:
        part = heads(q_blocks, shape.num_kv_heads)
        write(part, 0, turn(part, shape.num_heads, norms and norms.k))

    @pl.when(is_real & (block >= q_blocks + kv_blocks))
    def write_v() -> None:
        part = heads(q_blocks + kv_blocks, shape.num_kv_heads)
        write(part, 1, load(part, shape.num_heads + shape.num_kv_heads))


def _norm_heads(
    halves: tuple[jax.Array, jax.Array], part: _Block, weight_ref: Ref, head_dim: int, eps: float
) -> tuple[jax.Array, jax.Array]:
    """RMS norm over each head, given as two halves `[heads, lanes]`."""
    wide = [half.astype(jnp.float32) for half in halves]
    squares = jnp.sum(wide[0] * wide[0], axis=1) + jnp.sum(wide[1] * wide[1], axis=1)
    scale = jax.lax.rsqrt(squares / head_dim + jnp.float32(eps))[:, None]
    weights = [
        pltriton.load(weight_ref.at[part.lane + half * (head_dim // 2)], mask=part.mask, other=0)
        for half in (0, 1)
    ]
    dtype = halves[0].dtype
    return (
        (wide[0] * scale).astype(dtype) * weights[0],
        (wide[1] * scale).astype(dtype) * weights[1],
    )


def _head_blocks(shape: HeadShape, config: Config) -> tuple[int, int]:
    """Programs a token for the heads of q, and for those of k (v has as many)."""
    return (
        pl.cdiv(shape.num_heads, config.block_heads),
        pl.cdiv(shape.num_kv_heads, config.block_heads),
    )


def rope_write(
    qkv: jax.Array,
    pool: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    norms: HeadNorms | None = None,
    lora: jax.Array | None = None,
    *,
    shape: HeadShape,
    eps: float = 0.0,
    implementation: str,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Split a step's qkv product into heads, norm and rotate q and k, write k and v to the pool.

    Semantics: q[t] = rot(q_t); page[pages[t]][0, :, offsets[t]] = rot(k_t);
               page[pages[t]][1, :, offsets[t]] = v_t. In place when the pool is donated.
    Args:      qkv: `[T, (N + 2 K) H]`: the heads of q, of k, of v. pool:
               `[num_pages, 2 * K * page_size * H]`. cos, sin: f32 `[T, H / 2]`. pages, offsets:
               i32 `[T]`; padding tokens carry page 0, whose content is undefined; no other place
               is written twice. norms: weights of the norms over heads, with `eps`.
               lora: f32 `[at most T, (N + 2 K) H]`, what adapters add to qkv's first rows;
               rounded with it once.
    Returns:   (q `[T, N, H]` of qkv's dtype, the pool).
    Raises:    ValueError: shapes disagree or the implementation is unknown.
    Source:    RoFormer (arXiv:2104.09864), halves convention; PagedAttention (arXiv:2309.06180).
    """
    num_tokens = qkv.shape[0]
    if qkv.shape[1:] != (shape.width,) or not pages.shape == offsets.shape == (num_tokens,):
        raise ValueError(
            f"qkv {qkv.shape}, pages {pages.shape} and offsets {offsets.shape} disagree with "
            f"{shape}"
        )
    if not cos.shape == sin.shape == (num_tokens, shape.head_dim // 2) or shape.head_dim % 2:
        raise ValueError(f"cos {cos.shape} and sin {sin.shape} are not [T, head_dim / 2]")
    check_lora(lora, qkv)
    page_elems = 2 * shape.page_size * shape.num_kv_heads * shape.head_dim
    if pool.ndim != 2 or pool.shape[1] != page_elems:
        raise ValueError(f"pool has shape {pool.shape}, not [num_pages, {page_elems}]")
    if implementation == "xla":
        return rope_write_reference(
            qkv, pool, cos, sin, pages, offsets, norms, lora, shape=shape, eps=eps
        )  # fmt: skip
    if implementation == "triton":
        config = config or Config()
        q_blocks, kv_blocks = _head_blocks(shape, config)
        q_shape = (num_tokens, shape.num_heads, shape.head_dim)
        q, pool = triton_call(
            functools.partial(_kernel, shape=shape, config=config, eps=eps),
            (
                jax.ShapeDtypeStruct(q_shape, qkv.dtype),
                jax.ShapeDtypeStruct(pool.shape, pool.dtype),
            ),
            name="rope_write",
            grid=(num_tokens, q_blocks + 2 * kv_blocks),
            num_warps=config.num_warps,
            num_stages=1,
            interpret=interpret,
            aliases={1: 1},
        )(qkv, pool, cos, sin, pages, offsets, norms, lora)
        return q, pool
    raise unknown_implementation(implementation)
