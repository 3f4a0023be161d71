"""Flash-decoding in Pallas-Triton: one program a part of a row's context and a kv head.

How rows are cut is decided on the device (`decode_parts.py`). A row of one part is finished by its
program; the running softmaxes of others are joined by a second kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.attention_blocks import (
    LOWEST,
    KvPages,
    Softmax,
    attend_blocks,
    divide_seen,
    whole_blocks,
    window_blocks,
)
from pallas_kernels.decode_parts import Parts, count_rows, cut_contexts
from pallas_kernels.triton_blocks import MIN_DOT, Ref, next_power_of_2, triton_call
from pallas_kernels.tuning_table import shape_key, tuned

PROGRAMS_WANTED = 1024  # fill the device, whatever the lengths
MIN_PART = 256  # positions; joining shorter parts costs more than it gains
LONGEST_WHOLE = 4096  # positions that one program may read while the others are long done
JOINED_AT_ONCE = 16  # parts
MIXED_PROGRAMS = 64  # a kv head, in a mixed step, where most places for rows may be empty


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the work is divided."""

    extra_parts: int  # room for so many parts beside one a row; 0: rows stay whole
    min_part: int  # positions; rows are not cut into shorter parts
    heads_first: bool  # the programs of a part's heads start together, else those of a head's parts
    edges_apart: bool  # blocks that need masks have a loop of their own
    block_kv: int  # positions in a step of the loop
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, *, num_rows: int, num_kv_heads: int, max_length: int) -> Config:
        """A reasonable choice where nothing was measured."""
        num_programs = num_rows * num_kv_heads
        is_whole = num_programs >= PROGRAMS_WANTED and max_length <= LONGEST_WHOLE
        wanted = PROGRAMS_WANTED // num_kv_heads
        possible = num_rows * max(0, pl.cdiv(max_length, MIN_PART) - 1)
        return cls(
            extra_parts=0 if is_whole else min(max(wanted, 1), possible),
            min_part=MIN_PART,
            heads_first=True,
            edges_apart=True,
            block_kv=64,
            num_warps=4,
            num_stages=3,
        )


def table_key(
    *, head_dim: int, num_heads: int, num_kv_heads: int, num_rows: int, max_length: int
) -> str:
    """Where the tuning table has this shape; of lengths it knows only whether rows may be long."""
    return shape_key(
        head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_rows=num_rows,
        long=max_length > LONGEST_WHOLE,
    )


class Rows(NamedTuple):
    """The rows as the op takes them; inside a kernel, references. i32 `[B]`."""

    rows: Ref
    lengths: Ref
    window: Ref  # [1]
    num_rows: Ref  # [1]; those after it have length 0


def _attend_kernel(
    q_ref: Ref,
    pool_ref: Ref,
    page_table_ref: Ref,
    rows: Rows,
    parts: Parts | None,  # None: rows stay whole
    out_ref: Ref,  # [T, N, H] of q's dtype
    unjoined_ref: Ref,  # f32 [P, N, H], unnormalised
    highest_ref: Ref,  # f32 [P, N]
    total_ref: Ref,  # f32 [P, N]
    *,
    num_parts: int,
    num_programs: int,  # a kv head; each has every so many-th part
    config: Config,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    interpret: bool,
) -> None:
    first_part, kv_head = pl.program_id(0), pl.program_id(1)
    if config.heads_first:
        first_part, kv_head = kv_head, first_part
    _, num_heads, head_dim = q_ref.shape
    num_rows = rows.rows.shape[0]
    group = num_heads // num_kv_heads
    place = jnp.arange(max(MIN_DOT, next_power_of_2(group)), dtype=jnp.int32)
    head = kv_head * group + place
    lane = jnp.arange(next_power_of_2(head_dim), dtype=jnp.int32)
    mask = (place < group)[:, None] & (lane < head_dim)[None, :]

    def at(index: jax.Array) -> tuple[jax.Array, ...]:
        return jnp.full((1, 1), index), head[:, None], lane[None, :]

    def attend(token: jax.Array, row: jax.Array, begin: jax.Array, end: jax.Array) -> Softmax:
        q = pltriton.load(q_ref.at[at(token)], mask=mask, other=0)
        pages = KvPages(pool_ref, page_table_ref, row, kv_head, num_kv_heads, page_size, head_dim)

        def attend_block(block: jax.Array, softmax: Softmax, is_edge: bool) -> Softmax:
            written, visible = None, None
            if is_edge:
                position = block * config.block_kv + jnp.arange(config.block_kv, dtype=jnp.int32)
                is_visible = (position >= begin) & (position < end)
                visible = jnp.broadcast_to(is_visible[None, :], (len(place), config.block_kv))
                written = end
            k = pages.load(0, block, config.block_kv, written)
            v = pages.load(1, block, config.block_kv, written)
            return softmax.attend(q, k, lambda: v, visible, scale=scale, interpret=interpret)

        nothing = Softmax.empty(len(place), head_dim)
        blocks = window_blocks(begin, end, config.block_kv)
        if config.edges_apart:
            inner = whole_blocks(begin, end, config.block_kv)
            return attend_blocks(attend_block, nothing, blocks, inner)
        softmax: Softmax = jax.lax.fori_loop(
            *blocks, lambda block, softmax: attend_block(block, softmax, True), nothing
        )
        return softmax

    def finish(token: jax.Array, softmax: Softmax) -> None:
        out = softmax.normalised().astype(out_ref.dtype)
        pltriton.store(out_ref.at[at(token)], out, mask=mask)

    def attend_row(token: jax.Array) -> None:
        length = rows.lengths[token]
        begin = jnp.maximum(0, length - rows.window[0])
        finish(token, attend(token, rows.rows[token], begin, length))

    def attend_part(part: jax.Array) -> None:
        assert parts is not None
        token = parts.token[part]

        @pl.when(token < num_rows)
        def attend_real() -> None:
            softmax = attend(token, parts.row[part], parts.begin[part], parts.end[part])
            is_whole = parts.siblings[part] == 1
            pl.when(is_whole)(lambda: finish(token, softmax))

            @pl.when(jnp.logical_not(is_whole))
            def leave_unjoined() -> None:
                pltriton.store(unjoined_ref.at[at(part)], softmax.out, mask=mask)
                where = (jnp.full_like(head, part), head)
                pltriton.store(highest_ref.at[where], softmax.highest, mask=place < group)
                pltriton.store(total_ref.at[where], softmax.total, mask=place < group)

    attend_one = attend_row if parts is None else attend_part
    if num_programs >= num_parts:
        attend_one(first_part)
        return

    def take_turn(turn: jax.Array, _: None) -> None:
        attend_one(first_part + turn * num_programs)

    # rows without a length at the end are left out, as the op allows for a longer step
    num_real = (rows.num_rows if parts is None else parts.num_parts)[0]
    turns = pl.cdiv(jnp.maximum(0, num_real - first_part), num_programs)
    jax.lax.fori_loop(jnp.int32(0), turns, take_turn, None)


def _join_kernel(
    unjoined_ref: Ref,
    highest_ref: Ref,
    total_ref: Ref,
    token_ref: Ref,
    first_ref: Ref,
    count_ref: Ref,
    _: Ref,  # out, finished for tokens of one part
    out_ref: Ref,
    *,
    num_rows: int,
) -> None:
    """One program a cut token and head: one softmax from those of its parts."""
    cut, head = pl.program_id(0), pl.program_id(1)
    head_dim = out_ref.shape[2]
    token, first, count = token_ref[cut], first_ref[cut], count_ref[cut]

    @pl.when(token < num_rows)
    def join() -> None:
        lane = jnp.arange(next_power_of_2(head_dim), dtype=jnp.int32)
        is_lane = lane < head_dim

        def add(index: jax.Array, seen: Softmax) -> Softmax:
            place = index * JOINED_AT_ONCE + jnp.arange(JOINED_AT_ONCE, dtype=jnp.int32)
            is_part = place < count
            where = (first + place, jnp.full_like(place, head))
            part_highest = pltriton.load(highest_ref.at[where], mask=is_part, other=-jnp.inf)
            part_total = pltriton.load(total_ref.at[where], mask=is_part, other=0)
            part_out = pltriton.load(
                unjoined_ref.at[(*(w[:, None] for w in where), lane[None, :])],
                mask=is_part[:, None] & is_lane[None, :],
                other=0,
            )
            highest = jnp.maximum(seen.highest, jnp.max(part_highest))
            weight, kept = jnp.exp2(part_highest - highest), jnp.exp2(seen.highest - highest)
            return Softmax(
                seen.out * kept + jnp.sum(part_out * weight[:, None], axis=0),
                highest,
                seen.total * kept + jnp.sum(part_total * weight),
            )

        nothing = Softmax(jnp.zeros(lane.shape, jnp.float32), jnp.float32(LOWEST), jnp.float32(0))
        seen = jax.lax.fori_loop(jnp.int32(0), pl.cdiv(count, JOINED_AT_ONCE), add, nothing)
        out = divide_seen(seen.out, jnp.full_like(seen.out, seen.total))
        where = (jnp.full_like(lane, token), jnp.full_like(lane, head), lane)
        pltriton.store(out_ref.at[where], out.astype(out_ref.dtype), mask=is_lane)


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
    num_rows = len(rows)
    _, num_heads, head_dim = q.shape
    if config is None:
        sizes = {
            "num_rows": num_rows,
            "num_kv_heads": num_kv_heads,
            "max_length": page_table.shape[1] * page_size,
        }
        key = table_key(head_dim=head_dim, num_heads=num_heads, **sizes)
        config = tuned("paged_decode_attention", key, Config) or Config.heuristic(**sizes)
    parts = None
    if config.extra_parts:
        parts = cut_contexts(
            rows,
            lengths,
            window,
            block_kv=config.block_kv,
            extra_parts=config.extra_parts,
            min_part=config.min_part,
        )
    num_parts = num_rows + config.extra_parts
    num_programs = num_parts if len(q) == num_rows else min(num_parts, MIXED_PROGRAMS)
    unjoined = (num_parts if parts else 1, num_heads)
    out: jax.Array
    out, *by_part = triton_call(
        functools.partial(
            _attend_kernel,
            num_parts=num_parts,
            num_programs=num_programs,
            config=config,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            scale=scale,
            interpret=interpret,
        ),
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*unjoined, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(unjoined, jnp.float32),
            jax.ShapeDtypeStruct(unjoined, jnp.float32),
        ),
        name="paged_decode_attention",
        grid=(num_kv_heads, num_programs) if config.heads_first else (num_programs, num_kv_heads),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(q, pool, page_table, Rows(rows, lengths, window.reshape(1), count_rows(lengths)), parts)
    if parts:
        out = triton_call(
            functools.partial(_join_kernel, num_rows=num_rows),
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            name="join_attention_parts",
            grid=(len(parts.cut_token), num_heads),
            num_warps=1,
            num_stages=1,
            interpret=interpret,
            aliases={6: 0},
        )(*by_part, parts.cut_token, parts.first_of, parts.count_of, out)
    return out
