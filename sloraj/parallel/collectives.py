"""Every collective of the step, by name. Each is the identity on a mesh of one.

Per layer, with N devices, T tokens and padded rank R (the engine's max_rank), in elements a device
sends on a ring:

    attention, MLP    2 base all-reduces [T, D]                 Megatron
    q, k, v           1 all-gather of [T, 3, R / N]             S-LoRA section 6.2, fused over the
    modules gate, up          1 all-gather of [T, 2, R / N]
    o                 1 all-reduce of [T, 1, R]
    down              1 all-reduce of [T, 1, R]

The deltas of o and down are added to the device's own columns of the base partial sum, so the base
all-reduce finishes them without a collective of their own.
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
