"""Every collective of the step, by name. Each is the identity on a mesh of one.

Elements that each of N devices sends on a ring, for T tokens, B sampled rows and padded rank R (the
engine's max_rank, rounded up to a multiple of N):

    a layer   base o, base down   all-reduce [T, D] each        2 x 2 (N - 1) T D / N   Megatron
              q, k, v shrinks     all-gather [T, 3, R / N]          3 (N - 1) T R / N
              gate, up shrinks    all-gather [T, 2, R / N]          2 (N - 1) T R / N
              o, down shrinks     all-reduce [T, R] each        2 x 2 (N - 1) T R / N
    once      embedding           all-reduce [T, D]                 2 (N - 1) T D / N
              logits              all-gather [B, V / N]               (N - 1) B V / N

The shrinks' are those of S-LoRA section 6.2, fused over modules that share an input. The deltas of
o and down are added to the device's own columns of the base partial sum, so the base all-reduce
finishes them without a collective of their own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sloraj.parallel.mesh import AXIS


def sum_partial(x: jax.Array, tp: int) -> jax.Array:
    """Finish a row-parallel matmul (or a vocabulary-sharded lookup): all-reduce."""
    return x if tp == 1 else jax.lax.psum(x, AXIS)


def gather_rank_rows(v: jax.Array, tp: int) -> jax.Array:
    """[T, M, R / tp] of each device -> [T, M, R]; rank rows were dealt round-robin."""
    if tp == 1:
        return v
    gathered = jax.lax.all_gather(v, AXIS, axis=0)  # [tp, T, M, R / tp]
    return jnp.moveaxis(gathered, 0, -1).reshape(v.shape[0], v.shape[1], -1)


def gather_vocab(logits: jax.Array, tp: int) -> jax.Array:
    """[B, V / tp] of each device -> [B, V]."""
    return logits if tp == 1 else jax.lax.all_gather(logits, AXIS, axis=1, tiled=True)


def device_index(tp: int) -> jax.Array:
    return jnp.int32(0) if tp == 1 else jax.lax.axis_index(AXIS).astype(jnp.int32)
