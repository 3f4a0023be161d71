"""What the Pallas-Triton attention kernels share: reading KV from pages, the running softmax."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.triton_blocks import Ref, dot_f32, next_power_of_2

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # below every score and finite: the difference of two infinities is not a number


class KvPages(NamedTuple):
    """One sequence's keys and values for one kv head, found through its row of the page table."""

    pool: Ref
    page_table: Ref
    row: jax.Array
    kv_head: jax.Array
    num_kv_heads: int
    page_size: int
    head_dim: int

    def load(self, which: int, position: jax.Array, is_real: jax.Array) -> jax.Array:
        """Keys (0) or values (1) `[S, padded head_dim]` at i32 `[S]`; zeros where not real."""
        page_size = jnp.int32(self.page_size)
        place = jax.lax.div(position, page_size)
        page = pltriton.load(
            self.page_table.at[jnp.full_like(place, self.row), place], mask=is_real, other=0
        )
        lane = jnp.arange(next_power_of_2(self.head_dim), dtype=jnp.int32)
        first = (which * self.num_kv_heads + self.kv_head) * self.page_size
        first = (first + jax.lax.rem(position, page_size)) * self.head_dim
        kv: jax.Array = pltriton.load(
            self.pool.at[page[:, None], first[:, None] + lane[None, :]],
            mask=is_real[:, None] & (lane < self.head_dim)[None, :],
            other=0,
        )
        return kv


class Softmax(NamedTuple):
    """A softmax under way: what it has seen so far, unnormalised, in f32."""

    out: jax.Array  # [M, padded head_dim]
    highest: jax.Array  # [M]; scores are in units of log2
    total: jax.Array  # [M]

    @classmethod
    def empty(cls, num_queries: int, head_dim: int) -> Softmax:
        """Nothing seen yet."""
        return cls(
            jnp.zeros((num_queries, next_power_of_2(head_dim)), jnp.float32),
            jnp.full((num_queries,), LOWEST, jnp.float32),
            jnp.zeros((num_queries,), jnp.float32),
        )

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scale: float
    ) -> Softmax:
        """With keys and values `[S, padded head_dim]` added; visible: `[M, S]`."""
        scores = dot_f32(q, k.astype(q.dtype), trans_b=True) * (scale * LOG2_E)
        scores = jnp.where(visible, scores, LOWEST)
        highest = jnp.maximum(self.highest, jnp.max(scores, axis=1))
        weights = jnp.where(visible, jnp.exp2(scores - highest[:, None]), 0.0)
        kept = jnp.exp2(self.highest - highest)
        return Softmax(
            self.out * kept[:, None] + dot_f32(weights.astype(v.dtype), v),
            highest,
            self.total * kept + jnp.sum(weights, axis=1),
        )

    def normalised(self) -> jax.Array:
        """The attention output; zeros for queries that saw nothing."""
        return divide_seen(self.out, self.total[:, None])


def divide_seen(out: jax.Array, total: jax.Array) -> jax.Array:
    """out / total; zeros where nothing was seen. NaN stays NaN, so that overflow is not hidden."""
    return jnp.where(total == 0, 0.0, out / jnp.where(total == 0, 1.0, total))
