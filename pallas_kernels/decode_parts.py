"""How decode attention cuts rows into parts: on the device, from their lengths, once a step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention_blocks import window_blocks
from pallas_kernels.triton_blocks import Ref


class Parts(NamedTuple):
    """Cuts of the rows' contexts, i32 `[P]` unless said; inside a kernel, references to them."""

    token: Ref  # B where there is no part
    row: Ref  # of the page table
    begin: Ref  # first position
    end: Ref  # after the last one
    siblings: Ref  # parts of the same token, itself included
    num_parts: Ref  # [1]; those after it are of rows of length 0, or none
    cut_token: Ref  # [C] tokens of more than one part, then B
    first_of: Ref  # [C] the first part of such a token
    count_of: Ref  # [C] its parts


def count_rows(lengths: jax.Array) -> jax.Array:
    """Rows up to the last one that has a length, i32 `[1]`."""
    number = jnp.arange(1, len(lengths) + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(lengths > 0, number, 0), keepdims=True, initial=0)


def cut_contexts(
    rows: jax.Array,
    lengths: jax.Array,
    window: jax.Array,
    *,
    block_kv: int,
    extra_parts: int,
    min_part: int,
) -> Parts:
    """Parts of nearly equal length, at most `extra_parts` more than rows, at least one a row.

    All layers of a step cut alike: the compiler computes this once.
    """
    num_rows = len(rows)
    begin = jnp.maximum(0, lengths - window)
    first_block, last_block = window_blocks(begin, lengths, block_kv)
    blocks = last_block - first_block
    fair_blocks = pl.cdiv(jnp.sum(blocks, dtype=jnp.int32), extra_parts)
    part_blocks = jnp.maximum(fair_blocks, max(1, min_part // block_kv))
    count = jnp.maximum(1, pl.cdiv(blocks, part_blocks))
    ends = jnp.cumsum(count, dtype=jnp.int32)
    first = ends - count

    is_counted = jnp.arange(num_rows, dtype=jnp.int32) < count_rows(lengths)
    part = jnp.arange(num_rows + extra_parts, dtype=jnp.int32)
    token = _place_in(ends, part)
    index = jnp.minimum(token, num_rows - 1)
    from_block = first_block[index] + (part - first[index]) * part_blocks
    cut = jnp.arange(min(num_rows, extra_parts), dtype=jnp.int32)
    cut_token = _place_in(jnp.cumsum(count > 1, dtype=jnp.int32), cut)
    cut_index = jnp.minimum(cut_token, num_rows - 1)
    return Parts(
        token=token,
        row=rows[index],
        begin=jnp.maximum(begin[index], from_block * block_kv),
        end=jnp.minimum(lengths[index], (from_block + part_blocks) * block_kv),
        siblings=count[index],
        num_parts=jnp.sum(jnp.where(is_counted, count, 0), dtype=jnp.int32, keepdims=True),
        cut_token=cut_token,
        first_of=first[cut_index],
        count_of=count[cut_index],
    )


def _place_in(ends: jax.Array, number: jax.Array) -> jax.Array:
    """Of each number, the first place whose end (ascending) lies above it; len(ends) if none."""
    return jnp.sum(ends[None, :] <= number[:, None], axis=1, dtype=jnp.int32)
