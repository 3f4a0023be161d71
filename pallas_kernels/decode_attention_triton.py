"""Split-KV decode attention in Pallas-Triton: one program a row, kv head and part of the context.

With more than one part, the parts' running softmaxes are combined by XLA afterwards.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.attention_blocks import (
    KvPages,
    Softmax,
    attend_blocks,
    divide_seen,
    whole_blocks,
    window_blocks,
)
from pallas_kernels.triton_blocks import MIN_DOT, Ref, next_power_of_2, triton_call
from pallas_kernels.tuning_table import shape_key, tuned

PROGRAMS_WANTED = 512  # fills the device; with more parts, combining them costs more than it gains
MIN_SPLIT = 256  # positions; a shorter part is not worth combining


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the work is divided."""

    num_splits: int  # parts of a row's visible context
    block_kv: int  # positions in a step of the loop
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, *, num_rows: int, num_kv_heads: int, max_length: int) -> Config:
        """A reasonable choice where nothing was measured."""
        wanted = next_power_of_2(max(1, PROGRAMS_WANTED // (num_rows * num_kv_heads)))
        possible = next_power_of_2(max(1, max_length // MIN_SPLIT))
        return cls(num_splits=min(wanted, possible, 32), block_kv=64, num_warps=4, num_stages=3)


def _kernel(
    q_ref: Ref,
    pool_ref: Ref,
    page_table_ref: Ref,
    rows_ref: Ref,
    lengths_ref: Ref,
    window_ref: Ref,
    out_ref: Ref,  # [T, K, splits, G, H]; without splits in q's dtype, else unnormalised f32
    highest_ref: Ref,  # [T, K, splits, G]
    total_ref: Ref,  # [T, K, splits, G]
    *,
    config: Config,
    page_size: int,
    scale: float,
    interpret: bool,
) -> None:
    token, kv_head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    _, num_kv_heads, _, group, head_dim = out_ref.shape
    length = lengths_ref[token]
    begin = jnp.maximum(0, length - window_ref[0])
    first_block, last_block = window_blocks(begin, length, config.block_kv)
    split_blocks = pl.cdiv(last_block - first_block, config.num_splits)
    first = first_block + split * split_blocks
    last = jnp.minimum(first + split_blocks, last_block)

    num_queries = max(MIN_DOT, next_power_of_2(group))
    head = jnp.arange(num_queries, dtype=jnp.int32)
    lane = jnp.arange(next_power_of_2(head_dim), dtype=jnp.int32)
    is_query = (head < group)[:, None] & (lane < head_dim)[None, :]
    q_head = (kv_head * group + head)[:, None]
    q = pltriton.load(
        q_ref.at[jnp.full((1, 1), token), q_head, lane[None, :]], mask=is_query, other=0
    )
    pages = KvPages(
        pool_ref, page_table_ref, rows_ref[token], kv_head, num_kv_heads, page_size, head_dim
    )

    def attend_block(block: jax.Array, softmax: Softmax, is_edge: bool) -> Softmax:
        written, visible = (length, None) if is_edge else (None, None)
        if is_edge:
            position = block * config.block_kv + jnp.arange(config.block_kv, dtype=jnp.int32)
            visible = ((position >= begin) & (position < length))[None, :]
        k = pages.load(0, block, config.block_kv, written)
        v = pages.load(1, block, config.block_kv, written)
        return softmax.attend(q, k, lambda: v, visible, scale=scale, interpret=interpret)

    softmax = attend_blocks(
        attend_block,
        Softmax.empty(num_queries, head_dim),
        (first, last),
        whole_blocks(begin, length, config.block_kv),
    )
    out = softmax.normalised() if config.num_splits == 1 else softmax.out
    place = [jnp.full_like(head, index) for index in (token, kv_head, split)]
    pltriton.store(
        out_ref.at[(*(index[:, None] for index in place), head[:, None], lane[None, :])],
        out.astype(out_ref.dtype),
        mask=is_query,
    )
    pltriton.store(highest_ref.at[(*place, head)], softmax.highest, mask=head < group)
    pltriton.store(total_ref.at[(*place, head)], softmax.total, mask=head < group)


def _combine(out: jax.Array, highest: jax.Array, total: jax.Array) -> jax.Array:
    """One softmax from those of the parts (axis 2); zeros where none of them saw a key."""
    weight = jnp.exp2(highest - jnp.max(highest, axis=2, keepdims=True))
    whole = jnp.sum(total * weight, axis=2)[..., None]
    return divide_seen(jnp.sum(out * weight[..., None], axis=2), whole)


def decode_attention_triton(
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
    config: Config | None,
    interpret: bool,
) -> jax.Array:
    """`paged_decode_attention` in Pallas-Triton."""
    num_tokens, num_heads, head_dim = q.shape
    if config is None:
        sizes = {
            "num_rows": num_tokens,
            "num_kv_heads": num_kv_heads,
            "max_length": page_table.shape[1] * page_size,
        }
        key = shape_key(head_dim=head_dim, num_heads=num_heads, **sizes)
        config = tuned("paged_decode_attention", key, Config) or Config.heuristic(**sizes)
    parts = (num_tokens, num_kv_heads, config.num_splits, num_heads // num_kv_heads)
    out_dtype = q.dtype if config.num_splits == 1 else jnp.float32
    out, highest, total = triton_call(
        functools.partial(
            _kernel, config=config, page_size=page_size, scale=scale, interpret=interpret
        ),
        (
            jax.ShapeDtypeStruct((*parts, head_dim), out_dtype),
            jax.ShapeDtypeStruct(parts, jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ),
        name="paged_decode_attention",
        grid=(num_tokens, num_kv_heads, config.num_splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(q, pool, page_table, rows, lengths, jnp.asarray(window, jnp.int32).reshape(1))
    if config.num_splits > 1:
        out = _combine(out, highest, total).astype(q.dtype)
    attended: jax.Array = out.reshape(q.shape)
    return attended
