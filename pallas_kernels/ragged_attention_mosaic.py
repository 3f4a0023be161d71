"""Ragged prefill attention in Pallas Mosaic GPU (Hopper): one block a query tile and query head.

The shape of FlashAttention-3: one warpgroup copies keys and values into a ring in shared memory,
two others take turns on the tensor cores, each with half of the tile's queries. A KV page is one
TMA copy, its id read as a scalar from the page table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention_blocks import LOG2_E, LOWEST
from pallas_kernels.mosaic_blocks import Ref, interpret_params, plgpu
from pallas_kernels.tiles import QueryTiles

COMPUTE_GROUPS = 2  # warpgroups that multiply; a third copies
ROWS = 64  # of a wgmma: a compute warpgroup's queries
BLOCK_Q = COMPUTE_GROUPS * ROWS
SWIZZLE_BYTES = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one block works."""

    block_kv: int = 128  # positions in a step of the loop
    num_stages: int = 2  # blocks of keys and values in shared memory
    heads_apart: bool = False  # all tiles of a head before the next head, rather than the reverse
    take_turns: bool = True  # one compute warpgroup multiplies while the other does its softmax


def _take_turns(turn: Ref) -> None:
    """Wait until the other compute warpgroup comes here too."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


@dataclasses.dataclass(frozen=True)
class _Tile:
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


def _copy_kv(
    tile: _Tile, pages: Ref, page_table: Ref, kv_head: jax.Array, num_kv_heads: int, memory: Ref,
    *, config: Config,
) -> None:  # fmt: skip
    """The copying warpgroup. pages: `[num_pages * 2 * K, page_size, H]`."""
    _, _, k_smem, v_smem, _, k_full, v_full, k_free, v_free, _, _ = memory
    page_size = pages.shape[1]
    per_block = config.block_kv // page_size
    last_page = jax.lax.div(tile.end - 1, jnp.int32(page_size))

    def page_ids(step: jax.Array) -> tuple[jax.Array, ...]:
        first = (tile.first_block + step) * per_block
        # past the end a real page is read again: its keys are masked, its values zeroed
        return tuple(
            page_table[tile.page_row, jnp.minimum(first + i, last_page)] for i in range(per_block)
        )

    def copy_block(step: jax.Array, ids: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = jax.lax.rem(step, jnp.int32(config.num_stages))
        following = page_ids(step + 1)
        for which, smem, full, free in ((0, k_smem, k_full, k_free), (1, v_smem, v_full, v_free)):

            @pl.when(step >= config.num_stages)
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
    for slot in range(config.num_stages):  # every phase of a barrier is seen by who waits on it

        @pl.when(slot < tile.num_blocks)
        def wait_for_the_last(slot: int = slot) -> None:
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])


def _attend(
    tile: _Tile, group: jax.Array, head: jax.Array, q_ref: Ref, out_ref: Ref, memory: Ref,
    *, config: Config, scale: float, is_interpreted: bool,
) -> None:  # fmt: skip
    """A compute warpgroup: its 64 queries of the tile against all blocks."""
    q_smem, io_smem, k_smem, v_smem, q_full, k_full, v_full, k_free, v_free, turn, fixed = memory
    head_dim, dtype, block_kv = q_ref.shape[2], q_ref.dtype, config.block_kv
    q_smem, io_smem = q_smem.at[group], io_smem.at[group]
    q_offset = group * ROWS
    first_query = tile.position + q_offset  # its position
    num_blocks = tile.num_blocks
    layout = plgpu.Layout.WGMMA

    plgpu.copy_gmem_to_smem(
        q_ref.at[pl.ds(tile.q_start + q_offset, ROWS), head], io_smem, q_full.at[group]
    )
    plgpu.barrier_wait(q_full.at[group])
    # a TMA copy into tiles starts at a multiple of 8 rows, which queries need not
    q_smem[...] = plgpu.load(io_smem, layout=layout, optimized=False)
    plgpu.commit_smem()

    shape = (ROWS, block_kv)
    factor = scale * LOG2_E

    def attend_block(step: jax.Array, carry: Any) -> Any:
        out, highest, total = carry
        slot = jax.lax.rem(step, jnp.int32(config.num_stages))
        start = (tile.first_block + step) * block_kv
        plgpu.barrier_wait(k_full.at[slot])

        def multiply(scores_ref: Ref) -> jax.Array:
            plgpu.wgmma(scores_ref, q_smem, k_smem.at[slot].T)
            if config.take_turns:
                _take_turns(turn)
            scores: jax.Array = scores_ref[...]
            return scores

        scores = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])

        def mask(scores: jax.Array) -> jax.Array:
            query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            place = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
            distance = query - place + (first_query - start)
            return jnp.where((distance >= 0) & (distance < tile.window), scores, -math.inf)

        is_diagonal = start + block_kv > first_query + 1
        leaves_window = first_query + ROWS - start > tile.window
        scores = jax.lax.cond(is_diagonal | leaves_window, mask, lambda s: s, scores)

        new_highest = jnp.maximum(highest, jnp.max(scores, axis=1) * factor)
        kept = jnp.exp2(highest - new_highest)
        weights = jnp.exp2(scores * factor - jax.lax.broadcast_in_dim(new_highest, shape, [0]))
        out = out * jax.lax.broadcast_in_dim(kept, out.shape, [0])
        total = total * kept + jnp.sum(weights, axis=1)
        low = weights.astype(dtype)
        out, total, new_highest, low = jax.lax.optimization_barrier((out, total, new_highest, low))
        if config.take_turns:
            plgpu.barrier_arrive(turn)  # the other may multiply
        plgpu.barrier_wait(v_full.at[slot])

        @pl.when(start + block_kv > tile.end)
        def zero_what_is_not_written() -> None:
            # rows past the end hold others' leftovers; were one NaN, no zero weight would cancel it
            for piece in range(block_kv // ROWS):

                @pl.when(group == piece % COMPUTE_GROUPS)
                def zero(first: int = piece * ROWS) -> None:
                    rows = v_smem.at[slot, pl.ds(first, ROWS)]
                    place = plgpu.broadcasted_iota(jnp.int32, (ROWS, head_dim), 0, layout=layout)
                    values = plgpu.load(rows, layout=layout)
                    is_written = place < tile.end - (start + first)
                    rows[...] = jnp.where(is_written, values, jnp.zeros_like(values))
                    plgpu.commit_smem()

            _take_turns(fixed)

        if config.take_turns:
            plgpu.barrier_wait(turn)
        out = _add_product(out, low, v_smem.at[slot], is_interpreted)
        plgpu.barrier_arrive(v_free.at[slot])
        return out, new_highest, total

    per_query = layout.reduce(1)
    nothing = (
        plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), layout),
        plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), per_query),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), per_query),
    )
    if config.take_turns:
        pl.when(group == 1)(functools.partial(_take_turns, turn))
    out, _, total = jax.lax.fori_loop(0, num_blocks, attend_block, nothing)
    if config.take_turns:
        pl.when(group == 0)(functools.partial(_take_turns, turn))

    io_smem[...] = (out * jax.lax.broadcast_in_dim(1.0 / total, out.shape, [0])).astype(dtype)
    plgpu.commit_smem()
    _write_rows(io_smem, out_ref, tile.q_start + q_offset, tile.q_len - q_offset, head)


def _add_product(out: jax.Array, low: jax.Array, values: Ref, is_interpreted: bool) -> jax.Array:
    """out + low @ values, awaited."""
    if is_interpreted:  # the interpreter's wgmma takes no operand from registers
        return out + jnp.dot(low, values[...], preferred_element_type=jnp.float32)

    def multiply(out_ref: Ref) -> None:
        plgpu.wgmma(out_ref, low, values)

    added: jax.Array = pl.run_state(multiply)(plgpu.ACC.init(out))
    return added


def _write_rows(
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


def _kernel(
    q_ref: Ref, pages: Ref, page_table: Ref, row: Ref, q_start: Ref, q_len: Ref, position: Ref,
    num_tiles: Ref, window: Ref, out_ref: Ref, *memory: Ref,
    config: Config, num_kv_heads: int, scale: float, is_interpreted: bool,
) -> None:  # fmt: skip
    index = num_tiles[0] - 1 - jax.lax.axis_index("tile")  # the longest first, by and large
    head, group = jax.lax.axis_index("head"), jax.lax.axis_index("group")
    heads_per_kv = q_ref.shape[1] // num_kv_heads

    @pl.when(index >= 0)
    def attend_tile() -> None:
        tile = _Tile(
            q_start[index], q_len[index], position[index], window[0], row[index], config.block_kv
        )

        @pl.when(group < COMPUTE_GROUPS)
        def compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            _attend(
                tile, group, head, q_ref, out_ref, memory,
                config=config, scale=scale, is_interpreted=is_interpreted,
            )  # fmt: skip

        @pl.when(group == COMPUTE_GROUPS)
        def copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            kv_head = jax.lax.div(head, jnp.int32(heads_per_kv))
            _copy_kv(tile, pages, page_table, kv_head, num_kv_heads, memory, config=config)


def ragged_attention_mosaic(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    tiles: QueryTiles,
    window: jax.Array,
    base: jax.Array | None = None,
    *,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    config: Config | None,
    interpret: bool,
) -> jax.Array:
    """`paged_ragged_attention` in Mosaic GPU. `tiles.block_q` is 128."""
    _, num_heads, head_dim = q.shape
    config = config or Config()
    if tiles.block_q != BLOCK_Q:
        raise ValueError(f"block_q: got {tiles.block_q}, allowed: {BLOCK_Q}")
    stages, block_kv = config.num_stages, config.block_kv
    tiled = (
        plgpu.TilingTransform((8, SWIZZLE_BYTES // q.dtype.itemsize)),
        plgpu.SwizzleTransform(SWIZZLE_BYTES),
    )
    queries = (COMPUTE_GROUPS, ROWS, head_dim)
    per_block = block_kv // page_size
    grid = [("head", num_heads), ("tile", tiles.row.shape[0])]  # the last varies fastest
    if not config.heads_apart:
        grid.reverse()
    out_ref = jax.new_ref(jnp.zeros_like(q) if base is None else base)
    plgpu.kernel(
        functools.partial(
            _kernel,
            config=config,
            num_kv_heads=num_kv_heads,
            scale=scale,
            is_interpreted=interpret,
        ),
        out_type=(),
        scratch_types=(
            plgpu.SMEM(queries, q.dtype, transforms=tiled),
            plgpu.SMEM(queries, q.dtype),
            plgpu.SMEM((stages, block_kv, head_dim), q.dtype, transforms=tiled),
            plgpu.SMEM((stages, block_kv, head_dim), q.dtype, transforms=tiled),
            plgpu.Barrier(num_barriers=COMPUTE_GROUPS),
            plgpu.Barrier(num_arrivals=per_block, num_barriers=stages),
            plgpu.Barrier(num_arrivals=per_block, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
        ),
        grid=tuple(size for _, size in grid),
        grid_names=tuple(name for name, _ in grid),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_ragged_attention",
        interpret=interpret_params(interpret),
    )(
        q,
        pool.reshape(-1, page_size, head_dim),
        page_table,
        tiles.row,
        tiles.q_start,
        tiles.q_len,
        tiles.position,
        tiles.num_tiles,
        jnp.asarray(window, jnp.int32).reshape(1),
        out_ref,
    )
    return jax.freeze(out_ref)
