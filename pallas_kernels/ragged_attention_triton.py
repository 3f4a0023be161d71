"""Ragged prefill attention in Pallas-Triton: one program a query tile, kv head and block of heads.

The heads that share a kv head are stacked along the rows of the product, so that keys and values
are read once for several of them.
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
    whole_blocks,
    window_blocks,
)
from pallas_kernels.tiles import QueryTiles
from pallas_kernels.triton_blocks import MIN_DOT, Ref, next_power_of_2, triton_call
from pallas_kernels.tuning_table import shape_key, tuned

MAX_QUERIES = 128  # rows of the product, block_q times the heads of a block
SPARE_PROGRAMS = 8  # a unit, beyond the tiles that a step has if all are full
STAGED_BYTES = 64 << 10  # of keys and values that a step of the loop brings to shared memory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the work is divided.

    A unit is a kv head and a block of its query heads. `units_together` of them go through all
    tiles before the next ones: many end together with the dearest tiles done first, few share the
    keys and values that the cache holds.
    """

    block_heads: int  # query heads of one kv head that share a program
    units_together: int
    block_kv: int  # positions in a step of the loop
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, *, block_q: int, group: int, position_bytes: int) -> Config:
        """A reasonable choice where nothing was measured."""
        heads = min(next_power_of_2(group), max(1, MAX_QUERIES // next_power_of_2(block_q)))
        rows = next_power_of_2(block_q) * heads
        return cls(
            block_heads=heads,
            units_together=32,
            block_kv=min(max(64, rows), 128, STAGED_BYTES // position_bytes),
            num_warps=8 if rows >= MAX_QUERIES else 4,
            num_stages=3,
        )


def table_key(*, block_q: int, group: int, head_dim: int) -> str:
    """Where the tuning table has this shape."""
    return shape_key(block_q=block_q, group=group, head_dim=head_dim)


def _kernel(
    q_ref: Ref,
    pool_ref: Ref,
    page_table_ref: Ref,
    tiles: QueryTiles,  # of references
    window_ref: Ref,
    _: Ref,  # what out starts from
    out_ref: Ref,
    *,
    num_programs: int,  # a unit; each has every so many-th tile
    config: Config,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    interpret: bool,
) -> None:
    first_tile = pl.program_id(1)
    unit = pl.program_id(2) * config.units_together + pl.program_id(0)
    _, num_heads, head_dim = q_ref.shape
    group = num_heads // num_kv_heads
    head_blocks = pl.cdiv(group, config.block_heads)
    kv_head = jax.lax.div(unit, jnp.int32(head_blocks))
    head_block = jax.lax.rem(unit, jnp.int32(head_blocks))

    def attend_tile(tile: jax.Array) -> None:
        start, length = tiles.q_start[tile], tiles.q_len[tile]
        first_position, window = tiles.position[tile], window_ref[0]
        num_queries = max(MIN_DOT, next_power_of_2(tiles.block_q) * config.block_heads)
        query = jnp.arange(num_queries, dtype=jnp.int32)
        place = jax.lax.div(query, jnp.int32(config.block_heads))
        head = head_block * config.block_heads + jax.lax.rem(query, jnp.int32(config.block_heads))
        is_query = (place < length) & (head < group)
        lane = jnp.arange(next_power_of_2(head_dim), dtype=jnp.int32)
        where = ((start + place)[:, None], (kv_head * group + head)[:, None], lane[None, :])
        mask = is_query[:, None] & (lane < head_dim)[None, :]
        q = pltriton.load(q_ref.at[where], mask=mask, other=0)
        q_position = first_position + place
        end = first_position + length
        pages = KvPages(
            pool_ref, page_table_ref, tiles.row[tile], kv_head, num_kv_heads, page_size, head_dim
        )

        def attend_block(block: jax.Array, softmax: Softmax, is_edge: bool) -> Softmax:
            written, visible = (end, None) if is_edge else (None, None)
            if is_edge:
                position = block * config.block_kv + jnp.arange(config.block_kv, dtype=jnp.int32)
                distance = q_position[:, None] - position[None, :]
                # as unsigned numbers: a negative distance is beyond every window
                visible = distance.astype(jnp.uint32) < window.astype(jnp.uint32)
            return softmax.attend(
                q,
                pages.load(0, block, config.block_kv, written),
                lambda: pages.load(1, block, config.block_kv, written),
                visible,
                scale=scale,
                interpret=interpret,
            )

        seen_by_any = (jnp.maximum(0, first_position - window + 1), end)
        seen_by_all = (jnp.maximum(0, end - window), first_position + 1)
        softmax = attend_blocks(
            attend_block,
            Softmax.empty(num_queries, head_dim),
            window_blocks(*seen_by_any, config.block_kv),
            whole_blocks(*seen_by_all, config.block_kv),
        )
        pltriton.store(out_ref.at[where], softmax.normalised().astype(out_ref.dtype), mask=mask)

    def take_turn(turn: jax.Array, _: None) -> None:
        attend_tile(first_tile + turn * num_programs)

    @pl.when(kv_head < num_kv_heads)
    def take_turns() -> None:
        num_left = jnp.maximum(0, tiles.num_tiles[0] - first_tile)
        jax.lax.fori_loop(jnp.int32(0), pl.cdiv(num_left, num_programs), take_turn, None)


def ragged_attention_triton(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    tiles: QueryTiles,
    window: jax.Array,
    base: jax.Array | None,
    *,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    config: Config | None,
    interpret: bool,
) -> jax.Array:
    """`paged_ragged_attention` in Pallas-Triton."""
    group = q.shape[1] // num_kv_heads
    if config is None:
        key = table_key(block_q=tiles.block_q, group=group, head_dim=q.shape[2])
        config = tuned("paged_ragged_attention", key, Config) or Config.heuristic(
            block_q=tiles.block_q,
            group=group,
            position_bytes=2 * next_power_of_2(q.shape[2]) * pool.dtype.itemsize,
        )
    num_units = num_kv_heads * pl.cdiv(group, config.block_heads)
    # tiles may be many more than full ones, where all rows are short; mostly they are not
    num_programs = min(len(tiles.row), pl.cdiv(len(q), tiles.block_q) + SPARE_PROGRAMS)
    inputs = (q, pool, page_table, tiles, jnp.asarray(window, jnp.int32).reshape(1))
    out: jax.Array = triton_call(
        functools.partial(
            _kernel,
            num_programs=num_programs,
            config=config,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            scale=scale,
            interpret=interpret,
        ),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="paged_ragged_attention",
        grid=(config.units_together, num_programs, pl.cdiv(num_units, config.units_together)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        aliases={len(jax.tree.leaves(inputs)): 0},
    )(*inputs, jnp.zeros_like(q) if base is None else base)
    return out
