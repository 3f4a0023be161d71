"""The step buffer: every token appears once, in the right tile, with the right page and
position.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from sloraj.batch import ScheduledBatch, ScheduledRow
from sloraj.request import SamplingParams, Sequence
from sloraj.runner.buckets import Bucket, make_buckets
from sloraj.runner.packing import UNKNOWN, pack_step, step_packing

PAGE_SIZE, NULL_ROW = 4, 8
BUCKETS = make_buckets(8, 64, PAGE_SIZE, 16)
RANKS = {0: 0, 1: 8, 2: 64, 7: 16}  # of slots


def make_row(row: int, *, slot: int, start: int, num_tokens: int, known: int) -> ScheduledRow:
    sequence = Sequence(
        request_id=f"r{row}", index=0, prompt_token_ids=list(range(100, 100 + known)),
        params=SamplingParams(), max_output_tokens=9, stop_ids=frozenset(), seed=0, tag=row + 1,
        version_id=None, arrival_s=0.0,
    )  # fmt: skip
    stop = start + num_tokens
    sequence.pages = list(range(50 * row + 1, 50 * row + 1 + -(-stop // PAGE_SIZE)))
    return ScheduledRow(
        sequence=sequence, row=row, slot=slot, adapter_tag=slot, start=start,
        num_tokens=num_tokens, first_new_page=start // PAGE_SIZE, is_reset=False,
        samples=stop >= known,
    )  # fmt: skip


def random_batch(seed: int) -> ScheduledBatch:
    rng = random.Random(seed)
    rows, budget = [], 64
    for row in rng.sample(range(8), rng.randint(1, 8)):
        decode = rng.random() < 0.5
        start = rng.randint(0, 20)
        num_tokens = 1 if decode else rng.randint(1, max(1, min(30, budget)))
        known = start if decode else start + num_tokens + rng.choice([0, 5])
        if budget < num_tokens or known == 0:
            continue
        budget -= num_tokens
        slot = rng.choice([0, 1, 2, 7])
        rows.append(make_row(row, slot=slot, start=start, num_tokens=num_tokens, known=known))
    rows.sort(key=lambda r: r.num_tokens > 1)
    return ScheduledBatch(step=0, rows=tuple(rows))


def pack(batch: ScheduledBatch) -> tuple[Bucket, dict[str, np.ndarray]]:
    bucket = BUCKETS.pick(batch.num_tokens, batch.is_decode, batch.chunks)
    buffer = pack_step(
        batch, bucket, null_row=NULL_ROW, page_size=PAGE_SIZE, rank_of=RANKS.__getitem__
    )
    return bucket, step_packing(bucket).split(buffer)


def tile_kinds(bucket: Bucket) -> list[tuple[str, int]]:
    """The kinds of adapter tiles in a buffer, and how many rows a tile of each has at most."""
    longer = [] if bucket.is_decode else [("lora_tile", bucket.block_rows)]
    return [("single_tile", 1), *longer]


@pytest.mark.parametrize("seed", range(40))
def test_every_adapter_token_is_in_exactly_one_tile_of_its_slot(seed: int) -> None:
    batch = random_batch(seed)
    bucket, fields = pack(batch)
    slot_of = [r.slot for r in batch.rows for _ in range(r.num_tokens)]
    seen = {}
    for kind, block_rows in tile_kinds(bucket):
        for tile in range(int(fields[f"num_{kind}s"][0])):
            start, stop = fields[f"{kind}_starts"][tile : tile + 2]
            assert 0 < stop - start <= block_rows
            for token in fields[f"{kind}_order"][start:stop]:
                assert token not in seen
                seen[token] = fields[f"{kind}_slots"][tile]
    assert seen == {t: slot for t, slot in enumerate(slot_of) if slot}


@pytest.mark.parametrize("seed", range(40))
def test_single_tiles_have_the_rows_of_one_token_and_no_others(seed: int) -> None:
    batch = random_batch(seed)
    _, fields = pack(batch)
    num_tiles = int(fields["num_single_tiles"][0])
    singles = [token for token, row in enumerate(batch.rows) if row.num_tokens == 1 and row.slot]
    assert sorted(fields["single_tile_order"][:num_tiles]) == singles


@pytest.mark.parametrize("seed", range(40))
def test_tiles_of_high_rank_come_first_and_rows_without_a_tile_last(seed: int) -> None:
    bucket, fields = pack(random_batch(seed))
    for kind, _ in tile_kinds(bucket):
        num_tiles = int(fields[f"num_{kind}s"][0])
        ranks = [RANKS[int(slot)] for slot in fields[f"{kind}_slots"][:num_tiles]]
        assert ranks == sorted(ranks, reverse=True)
        num_tokens = bucket.num_singles if kind == "single_tile" else bucket.num_tokens
        assert sorted(fields[f"{kind}_order"].tolist()) == list(range(num_tokens))


@pytest.mark.parametrize("seed", range(40))
def test_tokens_carry_their_row_position_and_id(seed: int) -> None:
    batch = random_batch(seed)
    _, fields = pack(batch)
    token = 0
    for row in batch.rows:
        for position in range(row.start, row.start + row.num_tokens):
            known = position < row.sequence.num_known_tokens
            expected = row.sequence.token_id(position) if known else UNKNOWN
            got = (fields["rows"][token], fields["positions"][token], fields["token_ids"][token])
            assert got == (row.row, position, expected)
            token += 1
    assert (fields["rows"][token:] == NULL_ROW).all()
    assert fields["num_tokens"][0] == token


@pytest.mark.parametrize("seed", range(40))
def test_query_tiles_cover_every_token_of_longer_rows_once(seed: int) -> None:
    batch = random_batch(seed)
    bucket, fields = pack(batch)
    if bucket.is_decode:
        assert "query_tiles" not in fields
        return
    num_singles = int(fields["num_singles"][0])
    assert num_singles == sum(row.num_tokens == 1 for row in batch.rows)
    seen, ends = list(range(num_singles)), []
    for tile in range(int(fields["num_query_tiles"][0])):
        row, start, size, position = fields["query_tiles"][:, tile]
        assert 0 < size <= bucket.block_q
        assert fields["rows"][start] == row and fields["positions"][start] == position
        seen += range(start, start + size)
        ends.append(position + size)
    assert sorted(seen) == list(range(batch.num_tokens))
    assert ends == sorted(ends, reverse=True)  # the tile with most to read comes first


@pytest.mark.parametrize("seed", range(40))
def test_appends_name_exactly_the_new_pages(seed: int) -> None:
    batch = random_batch(seed)
    _, fields = pack(batch)
    expected = {
        (r.row, i, page)
        for r in batch.rows
        for i, page in enumerate(r.sequence.pages)
        if i >= r.first_new_page
    }
    appends = {tuple(entry) for entry in fields["appends"].tolist()}
    assert appends - {(NULL_ROW, 0, 0)} == expected


@pytest.mark.parametrize("seed", range(40))
def test_sampled_rows_point_at_their_last_token(seed: int) -> None:
    batch = random_batch(seed)
    _, fields = pack(batch)
    found = [
        (row, position)
        for row, position in zip(fields["logit_rows"], fields["logit_positions"], strict=True)
        if row != NULL_ROW
    ]
    assert found == [(r.row, r.start + r.num_tokens) for r in batch.rows if r.samples]
    for i, (_, position) in enumerate(found):
        assert fields["positions"][fields["logit_indices"][i]] == position - 1


@pytest.mark.parametrize(
    ("max_num_seqs", "budget"), [(1, 2), (4, 32), (64, 512), (100, 700), (256, 8192)]
)
def test_buckets_hold_every_batch_that_the_limits_allow(max_num_seqs: int, budget: int) -> None:
    buckets = make_buckets(max_num_seqs, budget, 16, 64)
    for n in range(1, max_num_seqs + 1):
        bucket = buckets.pick(n, True)
        assert bucket.num_tokens >= n and bucket.num_logits >= n
        assert bucket.num_logits in buckets.sample
    assert buckets.pick(budget, False).num_tokens == budget
    for n in range(1, budget + 1):
        bucket = buckets.pick(n, False)
        assert bucket.num_tokens >= n and bucket.num_logits >= min(n, max_num_seqs)
        assert bucket.num_logits in buckets.sample
        assert n <= 128 or bucket.num_tokens < 2 * n
    assert len(buckets.decode) + len(buckets.mixed) + 3 * len(buckets.sample) <= 22


def test_many_short_chunks_take_a_bucket_that_has_tiles_for_them() -> None:
    buckets = make_buckets(256, 2048, 16, 128)
    for num_chunks, length in ((1, 500), (10, 50), (40, 12), (100, 5), (256, 2), (200, 10)):
        bucket = buckets.pick(num_chunks * length, False, [length] * num_chunks)
        assert bucket.num_tokens >= num_chunks * length
        assert bucket.num_query_tiles >= num_chunks * -(-length // 128)
    assert buckets.pick(480, False, [48] * 10).num_tokens == 512
    assert buckets.pick(500, False, [5] * 100).num_tokens == 2048
