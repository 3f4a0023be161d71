"""The fixed shapes that programs are compiled for, chosen once from the configuration."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable

from sloraj.config import div_ceil

SMALL_DECODE_ROWS = (1, 4, 16, 64)
SAMPLE_ROWS = (8, 64)
SINGLE_BLOCK_ROWS = 1  # one adapter read by many rows comes from the cache
MIXED_BLOCK_ROWS = 64  # the fewest rows that a Hopper tensor core takes at full speed
MIN_MIXED_TOKENS = 128
# Rows with prefill that are shorter on average take a larger bucket than their tokens need: room
# for a query tile of every row that may be would cost every step, since programs start for it.
CHUNK_TOKENS = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Shape of one forward program: its token count and the capacities that follow from it."""

    num_tokens: int
    num_logits: int  # rows that may be sampled; a sample bucket
    is_decode: bool
    num_appends: int  # page-table entries that may change in a step
    num_singles: int  # tokens that may be single-token rows, which come first
    block_rows: int  # of adapter tiles of longer rows
    num_lora_tiles: int
    block_q: int
    num_query_tiles: int

    @property
    def name(self) -> str:
        return f"{'decode' if self.is_decode else 'mixed'}-{self.num_tokens}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    decode: tuple[Bucket, ...]
    mixed: tuple[Bucket, ...]
    sample: tuple[int, ...]
    lora_variants: tuple[str, ...] = ("all",)  # of each forward program

    def pick(self, num_tokens: int, is_decode: bool, chunks: Iterable[int] = ()) -> Bucket:
        """The smallest bucket that holds a step; `chunks` are the lengths of its longer rows."""
        choices = self.decode if is_decode else self.mixed
        sizes = [b.num_tokens for b in choices]
        place = bisect.bisect_left(sizes, num_tokens)
        num_tiles = sum(div_ceil(length, choices[place].block_q) for length in chunks)
        while num_tiles > choices[place].num_query_tiles:
            place += 1
        return choices[place]


def make_buckets(
    max_num_seqs: int, max_num_batched_tokens: int, page_size: int, block_q: int
) -> Buckets:
    """Few enough that compiling them is quick: about two dozen programs at 128 rows.

    Decoding is bound by reading weights, so padding a few rows costs nothing: its buckets are far
    apart while small. Mixed steps are bound by arithmetic from a few hundred tokens on: powers of
    two up to the token budget, to which the scheduler cuts its chunks.
    """
    sample = [n for n in SAMPLE_ROWS if 4 * n <= max_num_seqs] + [max_num_seqs]

    def fit(num_rows: int) -> int:
        return sample[bisect.bisect_left(sample, num_rows)]

    decode = tuple(
        Bucket(
            num_tokens=n,
            num_logits=fit(n),
            is_decode=True,
            num_appends=n,
            num_singles=n,
            block_rows=SINGLE_BLOCK_ROWS,
            num_lora_tiles=0,
            block_q=1,
            num_query_tiles=n,
        )
        for n in _decode_rows(max_num_seqs)
    )
    mixed = tuple(
        Bucket(
            num_tokens=n,
            num_logits=fit(rows),
            is_decode=False,
            num_appends=div_ceil(n, page_size) + 2 * rows,
            num_singles=rows,
            block_rows=MIXED_BLOCK_ROWS,
            num_lora_tiles=div_ceil(n, MIXED_BLOCK_ROWS) + rows,
            block_q=block_q,
            num_query_tiles=div_ceil(n, block_q)
            + (rows if n == max_num_batched_tokens else min(rows, n // CHUNK_TOKENS)),
        )
        for n in _doubling(min(MIN_MIXED_TOKENS, max_num_batched_tokens), max_num_batched_tokens)
        for rows in [min(n, max_num_seqs)]
    )
    return Buckets(decode=decode, mixed=mixed, sample=tuple(sample))


def _decode_rows(max_num_seqs: int) -> list[int]:
    small = [n for n in SMALL_DECODE_ROWS if n < max_num_seqs]
    return small + _doubling(min(2 * SMALL_DECODE_ROWS[-1], max_num_seqs), max_num_seqs)


def _doubling(first: int, last: int) -> list[int]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]
