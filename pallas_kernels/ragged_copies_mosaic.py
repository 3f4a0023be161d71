"""What the Mosaic GPU ragged attention copies: tiles of queries, pages of keys and values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_blocks import Ref, plgpu

COMPUTE_GROUPS = 2  # warpgroups that multiply; a third copies
ROWS = 64  # of a wgmma: a compute warpgroup's queries
BLOCK_Q = COMPUTE_GROUPS * ROWS


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one block knows of its work; i32 scalars, and the positions it reads."""

    q_start: jax.Array
    q_len: jax.Array
    position: jax.Array
    window: jax.Array
    page_row: jax.Array
    block_kv: int

    @property
    def end(self) -> jax.Array:
        """Written positions."""
        return self.position + self.q_len

    @property
    def first_block(self) -> jax.Array:
        begin = jnp.maximum(0, self.position - self.window + 1)
        return jax.lax.div(begin, jnp.int32(self.block_kv))

    @property
    def num_blocks(self) -> jax.Array:
        return pl.cdiv(self.end, jnp.int32(self.block_kv)) - self.first_block


def copy_kv(
    tile: Tile, pages: Ref, page_table: Ref, kv_head: jax.Array, num_kv_heads: int, memory: Ref,
    *, num_stages: int,
) -> None:  # fmt: skip
    """The copying warpgroup. pages: `[num_pages * 2 * K, page_size, H]`."""
    _, _, k_smem, v_smem, _, k_full, v_full, k_free, v_free, _, _ = memory
    page_size = pages.shape[1]
    per_block = tile.block_kv // page_size
    last_page = jax.lax.div(tile.end - 1, jnp.int32(page_size))

    def page_ids(step: jax.Array) -> tuple[jax.Array, ...]:
        first = (tile.first_block + step) * per_block
        # past the end a real page is read again: its keys are masked, its values zeroed
        return tuple(
            page_table[tile.page_row, jnp.minimum(first + i, last_page)] for i in range(per_block)
        )

    def copy_block(step: jax.Array, ids: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = jax.lax.rem(step, jnp.int32(num_stages))
        following = page_ids(step + 1)
        for which, smem, full, free in ((0, k_smem, k_full, k_free), (1, v_smem, v_full, v_free)):

            @pl.when(step >= num_stages)
            def wait_until_used(free: Ref = free) -> None:
                plgpu.barrier_wait(free.at[slot])

            for i, page in enumerate(ids):
                plgpu.copy_gmem_to_smem(
                    pages.at[(page * 2 + which) * num_kv_heads + kv_head],
                    smem.at[slot, pl.ds(i * page_size, page_size)],
                    full.at[slot],
                )
        return following

    jax.lax.fori_loop(0, tile.num_blocks, copy_block, page_ids(jnp.int32(0)))
    for slot in range(num_stages):  # every phase of a barrier is seen by who waits on it

        @pl.when(slot < tile.num_blocks)
        def wait_for_the_last(slot: int = slot) -> None:
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])


def write_rows(
    rows: Ref, out_ref: Ref, start: jax.Array, count: jax.Array, head: jax.Array
) -> None:
    """Write the first `count` of 64 rows: copies have fixed sizes, so one for each power of two."""
    for size in (64, 32, 16, 8, 4, 2, 1):
        is_whole = count >= ROWS
        done = jnp.bitwise_and(jnp.maximum(count, 0), -2 * size)

        @pl.when(is_whole if size == 64 else (~is_whole & (count > 0) & ((count & size) != 0)))
        def write(size: int = size, done: jax.Array = done) -> None:
            first = 0 if size == 64 else done
            plgpu.copy_smem_to_gmem(
                rows.at[pl.ds(first, size)], out_ref.at[pl.ds(start + first, size), head]
            )

    plgpu.wait_smem_to_gmem(0)
