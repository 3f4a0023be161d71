"""What the Pallas-Triton attention kernels share: reading KV from pages, the running softmax."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
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

    def load(self, which: int, block: jax.Array, size: int, end: jax.Array | None) -> jax.Array:
        """Keys (0) or values (1) `[size, padded head_dim]` of a block of so many positions.

        Positions from `end` on are zeros; None: all are written.
        """
        page_size = jnp.int32(self.page_size)
        step = jnp.arange(size, dtype=jnp.int32)
        if size % self.page_size == 0:  # then all but the page is the same for every block
            place = block * (size // self.page_size) + jax.lax.div(step, page_size)
            inside = jax.lax.rem(step, page_size)
        else:
            place = jax.lax.div(block * size + step, page_size)
            inside = jax.lax.rem(block * size + step, page_size)
        is_real = None if end is None else block * size + step < end
        page = pltriton.load(
            self.page_table.at[jnp.full_like(place, self.row), place],
            mask=is_real,
            other=None if is_real is None else 0,
        )
        lane = jnp.arange(next_power_of_2(self.head_dim), dtype=jnp.int32)
        first = (which * self.num_kv_heads + self.kv_head) * (self.page_size * self.head_dim)
        mask = None if len(lane) == self.head_dim else (lane < self.head_dim)[None, :]
        if is_real is not None:
            mask = is_real[:, None] if mask is None else is_real[:, None] & mask
        kv: jax.Array = pltriton.load(
            self.pool.at[page[:, None], first + (inside * self.head_dim)[:, None] + lane[None, :]],
            mask=None if mask is None else jnp.broadcast_to(mask, (size, len(lane))),
            other=None if mask is None else 0,
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
        self,
        q: jax.Array,
        k: jax.Array,
        v: Callable[[], jax.Array],
        visible: jax.Array | None,
        *,
        scale: float,
        interpret: bool,
    ) -> Softmax:
        """With keys `[S, padded head_dim]` added and the values that `v` loads.

        visible: `[M, S]`; None: all of them. v is a function because the compiler keeps the order
        of loads: values are not waited for before the scores need them.
        """
        factor = scale * LOG2_E
        scores = dot_f32(q, k.astype(q.dtype), trans_b=True)
        if visible is not None:  # hidden ones lie below LOWEST, so that their weight is exactly 0
            scores = jnp.where(visible, scores, 2 * LOWEST / factor)
        highest = jnp.maximum(self.highest, jnp.max(scores, axis=1) * factor)
        weights = exp2_scaled(scores, factor, highest, interpret=interpret)
        kept = jnp.exp2(self.highest - highest)
        values = v()
        return Softmax(
            self.out * kept[:, None] + dot_f32(weights.astype(values.dtype), values),
            highest,
            self.total * kept + jnp.sum(weights, axis=1),
        )

    def normalised(self) -> jax.Array:
        """The attention output; zeros for queries that saw nothing."""
        return divide_seen(self.out, self.total[:, None])


def exp2_scaled(
    scores: jax.Array, factor: float, highest: jax.Array, *, interpret: bool
) -> jax.Array:
    """exp2(scores * factor - highest) for scores `[M, S]` and highest `[M]`.

    Triton does not contract a product and a sum, and this one is a tenth of the instructions of a
    prefill: so it is written out for the GPU.
    """
    highest = jnp.broadcast_to(highest[:, None], scores.shape)
    if interpret:
        return jnp.exp2(scores * factor - highest)
    (factor_bits,) = struct.unpack("<I", struct.pack("<f", factor))
    (weights,) = pltriton.elementwise_inline_asm(
        f"{{ .reg .f32 t; fma.rn.f32 t, $1, 0f{factor_bits:08X}, $2; ex2.approx.ftz.f32 $0, t; }}",
        args=[scores, -highest],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)],
    )
    return weights


def attend_blocks(
    attend: Callable[[jax.Array, Softmax, bool], Softmax],
    softmax: Softmax,
    blocks: tuple[jax.Array, jax.Array],
    inner: tuple[jax.Array, jax.Array],
) -> Softmax:
    """`attend(block, softmax, is_edge)` over blocks [first, last), those of `inner` without masks.

    A softmax takes its keys in any order: so the blocks before and after `inner` share one loop.
    """
    first, last = blocks
    inner_first = jnp.clip(inner[0], first, last)
    inner_last = jnp.clip(inner[1], inner_first, last)
    softmax = jax.lax.fori_loop(
        inner_first, inner_last, lambda block, seen: attend(block, seen, False), softmax
    )
    num_before = inner_first - first

    def attend_edge(index: jax.Array, seen: Softmax) -> Softmax:
        after = inner_last + index - num_before
        return attend(jnp.where(index < num_before, first + index, after), seen, True)

    num_edges = num_before + last - inner_last
    softmax = jax.lax.fori_loop(jnp.int32(0), num_edges, attend_edge, softmax)
    return softmax


def window_blocks(begin: jax.Array, end: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The blocks of `size` positions, [first, last), that hold the positions [begin, end)."""
    return jax.lax.div(begin, jnp.int32(size)), pl.cdiv(end, size)


def whole_blocks(begin: jax.Array, end: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The blocks of `size` positions, [first, last), that lie in [begin, end) as a whole."""
    return pl.cdiv(begin, size), jax.lax.div(end, jnp.int32(size))


def divide_seen(out: jax.Array, total: jax.Array) -> jax.Array:
    """out / total; zeros where nothing was seen. NaN stays NaN, so that overflow is not hidden."""
    return jnp.where(total == 0, 0.0, out / jnp.where(total == 0, 1.0, total))
