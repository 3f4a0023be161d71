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
from pallas_kernels.ragged_copies_mosaic import (
    BLOCK_Q,
    COMPUTE_GROUPS,
    ROWS,
    Tile,
    copy_kv,
    write_rows,
)
from pallas_kernels.tiles import QueryTiles

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


def _attend(
    tile: Tile, group: jax.Array, head: jax.Array, q_ref: Ref, out_ref: Ref, memory: Ref,
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
    write_rows(io_smem, out_ref, tile.q_start + q_offset, tile.q_len - q_offset, head)


def _add_product(out: jax.Array, low: jax.Array, values: Ref, is_interpreted: bool) -> jax.Array:
    """out + low @ values, awaited."""
    if is_interpreted:  # the interpreter's wgmma takes no operand from registers
        return out + jnp.dot(low, values[...], preferred_element_type=jnp.float32)

    def multiply(out_ref: Ref) -> None:
        plgpu.wgmma(out_ref, low, values)

    added: jax.Array = pl.run_state(multiply)(plgpu.ACC.init(out))
    return added


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
        tile = Tile(
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
            copy_kv(
                tile, pages, page_table, kv_head, num_kv_heads, memory, num_stages=config.num_stages
            )


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
    """`paged_ragged_attention` in Mosaic GPU.

    Raises: ValueError: `tiles.block_q` is not 128, or the shape is one of those that
    `dispatch.mosaic_refusal` names.
    """
    _, num_heads, head_dim = q.shape
    config = config or Config()
    if tiles.block_q != BLOCK_Q:
        raise ValueError(f"block_q: got {tiles.block_q}, allowed: {BLOCK_Q}")
    if head_dim not in (64, 128) or q.dtype.itemsize != 2 or q.dtype != pool.dtype:
        raise ValueError(f"q: got {q.dtype} {q.shape} and a pool of {pool.dtype}")
    if page_size % 8 or config.block_kv % page_size:
        raise ValueError(f"page_size: got {page_size}, allowed: 8, 16, 32, 64, 128")
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
