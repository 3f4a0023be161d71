"""A step's host data as one int32 buffer: written with numpy here, read back inside the program.

One buffer is one transfer. `Packing` fixes the place of each field for a bucket; both sides use it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
import numpy as np

from sloraj.batch import ScheduledBatch, ScheduledRow
from sloraj.config import div_ceil
from sloraj.runner.buckets import SINGLE_BLOCK_ROWS, Bucket

Buffer = TypeVar("Buffer", np.ndarray, jax.Array)
UNKNOWN = -1  # token id that only the device knows: the row's last sampled token


@dataclasses.dataclass(frozen=True, slots=True)
class Packing:
    """Named fields, back to back."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    def split(self, buffer: Buffer) -> dict[str, Buffer]:
        """Views of the fields of a numpy buffer, or slices of a device array."""
        fields, start = {}, 0
        for name, shape in self.shapes:
            stop = start + math.prod(shape)
            fields[name] = buffer[start:stop].reshape(shape)
            start = stop
        return fields


def step_packing(bucket: Bucket) -> Packing:
    t, b = bucket.num_tokens, bucket.num_logits
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("token_ids", (t,)),
        ("rows", (t,)),
        ("positions", (t,)),
        ("num_tokens", (1,)),
        ("logit_indices", (b,)),
        ("logit_rows", (b,)),
        ("logit_positions", (b,)),
        ("batch_rows", (b,)),
        ("num_read_pages", (b,)),
        ("appends", (bucket.num_appends, 3)),
        *_tile_shapes("single_tile", bucket.num_singles, bucket.num_singles),
    ]
    if not bucket.is_decode:
        shapes += [
            *_tile_shapes("lora_tile", t, bucket.num_lora_tiles),
            ("query_tiles", (4, bucket.num_query_tiles)),
            ("num_query_tiles", (1,)),
            ("num_singles", (1,)),
        ]
    return Packing(tuple(shapes))


def _tile_shapes(
    prefix: str, num_tokens: int, capacity: int
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The fields of one `LoraTiles`."""
    return (
        (f"{prefix}_order", (num_tokens,)),
        (f"{prefix}_starts", (capacity + 1,)),
        (f"{prefix}_slots", (capacity,)),
        (f"num_{prefix}s", (1,)),
    )


def pack_step(
    batch: ScheduledBatch,
    bucket: Bucket,
    *,
    null_row: int,
    page_size: int,
    rank_of: Callable[[int], int],
) -> np.ndarray:
    """The buffer of one step. Rows beyond the batch are padding that points at the null row.

    `rank_of(slot)`: the largest rank in an adapter slot.
    """
    packing = step_packing(bucket)
    buffer = np.zeros(packing.size, np.int32)
    fields = packing.split(buffer)
    fields["rows"][:] = null_row
    fields["logit_rows"][:] = null_row
    fields["batch_rows"][:] = null_row
    fields["appends"][:, 0] = null_row
    fields["num_tokens"][0] = batch.num_tokens
    if batch.is_decode:
        _pack_single_tokens(batch.rows, fields)
    else:
        _pack_tokens(batch.rows, fields)
    n = len(batch.rows)
    fields["batch_rows"][:n] = [r.row for r in batch.rows]
    fields["num_read_pages"][:n] = [div_ceil(r.start + r.num_tokens, page_size) for r in batch.rows]
    _pack_appends(batch.rows, fields, page_size)
    num_singles = _count_singles(batch.rows)
    _pack_lora_tiles(batch.rows[:num_singles], 0, fields, "single_tile", SINGLE_BLOCK_ROWS, rank_of)
    if not bucket.is_decode:
        longer = batch.rows[num_singles:]
        _pack_lora_tiles(longer, num_singles, fields, "lora_tile", bucket.block_rows, rank_of)
        _pack_query_tiles(longer, num_singles, fields, bucket.block_q)
    return buffer


def _count_singles(rows: Sequence[ScheduledRow]) -> int:
    """Single-token rows, which come first: attention and adapters take them as decode steps do."""
    return sum(1 for _ in itertools.takewhile(lambda row: row.num_tokens == 1, rows))


def _pack_single_tokens(rows: Sequence[ScheduledRow], fields: dict[str, np.ndarray]) -> None:
    n = len(rows)
    fields["token_ids"][:n] = [_token_id(r) for r in rows]
    fields["rows"][:n] = [r.row for r in rows]
    fields["positions"][:n] = [r.start for r in rows]
    sampled = [(i, r.row, r.start + 1) for i, r in enumerate(rows) if r.samples]
    _pack_sampled(sampled, fields)


def _token_id(row: ScheduledRow) -> int:
    sequence = row.sequence
    return sequence.token_id(row.start) if row.start < sequence.num_known_tokens else UNKNOWN


def _pack_tokens(rows: Sequence[ScheduledRow], fields: dict[str, np.ndarray]) -> None:
    token, sampled = 0, []
    for row in rows:
        stop = token + row.num_tokens
        fields["token_ids"][token:stop] = known_token_ids(row)
        fields["rows"][token:stop] = row.row
        fields["positions"][token:stop] = np.arange(row.start, row.start + row.num_tokens)
        if row.samples:
            sampled.append((stop - 1, row.row, row.start + row.num_tokens))
        token = stop
    _pack_sampled(sampled, fields)


def known_token_ids(row: ScheduledRow) -> list[int]:
    """Ids of the row's tokens; UNKNOWN where only the device has it."""
    if row.num_tokens == 1:
        return [_token_id(row)]
    sequence, stop = row.sequence, row.start + row.num_tokens
    prompt = sequence.num_prompt_tokens
    ids = sequence.prompt_token_ids[row.start : stop]
    if stop > prompt:
        ids = ids + sequence.output_token_ids[max(row.start - prompt, 0) : stop - prompt]
    return ids + [UNKNOWN] * (row.num_tokens - len(ids))


def _pack_sampled(sampled: list[tuple[int, int, int]], fields: dict[str, np.ndarray]) -> None:
    if sampled:
        n = len(sampled)
        index, row, position = zip(*sampled, strict=True)
        fields["logit_indices"][:n] = index
        fields["logit_rows"][:n] = row
        fields["logit_positions"][:n] = position


def _pack_appends(
    rows: Iterable[ScheduledRow], fields: dict[str, np.ndarray], page_size: int
) -> None:
    appends = [
        (row.row, index, row.sequence.pages[index])
        for row in rows
        for index in range(row.first_new_page, div_ceil(row.start + row.num_tokens, page_size))
    ]
    if appends:
        fields["appends"][: len(appends)] = appends


def _pack_lora_tiles(
    rows: Sequence[ScheduledRow],
    first_token: int,
    fields: dict[str, np.ndarray],
    prefix: str,
    block_rows: int,
    rank_of: Callable[[int], int],
) -> None:
    """The tiles of successive rows, whose tokens start at `first_token`, into the fields `prefix`.

    Tiles by falling rank: the device takes them in order, and should not begin a long one last.
    The order names every token once: those in no tile, padding too, come last.
    """
    starts_of = first_token + np.concatenate([[0], np.cumsum([r.num_tokens for r in rows])])
    by_slot: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if row.slot:
            by_slot.setdefault(row.slot, []).append(index)
    starts, slots, order, covered = [0], [], [], 0
    for slot in sorted(by_slot, key=lambda slot: (-rank_of(slot), slot)):
        size = 0
        for index in by_slot[slot]:
            order.append(np.arange(starts_of[index], starts_of[index + 1]))
            size += rows[index].num_tokens
        for begin in range(0, size, block_rows):
            slots.append(slot)
            starts.append(covered + min(begin + block_rows, size))
        covered += size
    n, row_order = len(slots), fields[f"{prefix}_order"]
    is_in_tile = np.zeros(len(row_order), np.bool_)
    if n:
        row_order[:covered] = np.concatenate(order)
        is_in_tile[row_order[:covered]] = True
    row_order[covered:] = np.flatnonzero(~is_in_tile)
    fields[f"{prefix}_starts"][: n + 1] = starts
    fields[f"{prefix}_starts"][n + 1 :] = covered
    fields[f"{prefix}_slots"][:n] = slots
    fields[f"num_{prefix}s"][0] = n


def _pack_query_tiles(
    rows: Sequence[ScheduledRow], first_token: int, fields: dict[str, np.ndarray], block_q: int
) -> None:
    """What attention takes of the longer rows, whose tokens start at `first_token`."""
    tiles, token = [], first_token
    for row in rows:
        for begin in range(0, row.num_tokens, block_q):
            size = min(block_q, row.num_tokens - begin)
            tiles.append((row.row, token + begin, size, row.start + begin))
        token += row.num_tokens
    # A tile costs what lies before its end. The device takes them in order: the dearest come first,
    # so that it is not left waiting for one of them.
    tiles.sort(key=lambda tile: tile[2] + tile[3], reverse=True)
    if tiles:
        fields["query_tiles"][:, : len(tiles)] = np.array(tiles, np.int32).T
    fields["num_query_tiles"][0] = len(tiles)
    fields["num_singles"][0] = first_token
