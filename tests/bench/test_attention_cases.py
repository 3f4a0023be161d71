"""The batches that attention is measured on: their floors, pages and tiles."""

from __future__ import annotations

import argparse
import time

import numpy as np
import pytest

from bench import kernels_attention, profile_step
from bench.attention_cases import Batch, make_inputs, random_pool
from bench.floors import Peaks
from tests.bench.cpu_profile import cpu_events

PEAKS = Peaks(read_bytes_per_s=1e12, flops_per_s=1e14)


def test_a_batch_costs_the_bytes_of_its_rows_and_the_operations_of_its_chunks() -> None:
    rows = Batch(name="rows", model="llama-3.1-8b", contexts=(512, 100))
    assert rows.floor_s(PEAKS) == 612 * 2 * 8 * 128 * 2 / 1e12
    chunk = Batch(name="chunk", model="llama-3.1-8b", chunks=((1000, 4096),))
    pairs = sum(1000 + i + 1 for i in range(4096))
    assert np.isclose(chunk.floor_s(PEAKS), 4 * pairs * 32 * 128 / 1e14)


def test_inputs_never_share_a_page_and_tiles_cover_the_chunks() -> None:
    batch = Batch(
        name="mixed", model="demo", contexts=(20, 1), chunks=((30, 40), (0, 5)), num_padding=3
    )
    inputs, (pool, rows, lengths, tiles) = make_inputs(batch, 16, num_inputs=2)
    pages = np.concatenate([np.asarray(table).ravel() for _, table in inputs])
    used = pages[pages > 0]
    assert len(set(used.tolist())) == len(used) == 2 * (2 + 1 + 5 + 1) <= len(pool)
    assert lengths.tolist() == [20, 1, 0, 0, 0] and rows.tolist() == [0, 1, 2, 3, 4]
    assert tiles is not None
    spans = [
        (int(row), int(position), int(size))
        for row, position, size in zip(tiles.row, tiles.position, tiles.q_len, strict=True)
    ]
    assert spans[: int(tiles.num_tiles[0])] == [(2, 62, 8), (2, 46, 16), (2, 30, 16), (3, 0, 5)]


def test_a_shared_pool_gives_each_input_pages_of_its_own_and_next_ones_in_turn() -> None:
    batch = Batch(name="rows", model="demo", contexts=(40, 17))
    pool = random_pool(13, batch.shape.page_elems)
    inputs, (shared, *_) = make_inputs(batch, 16, num_inputs=3, pool=pool)
    assert shared is pool
    tables = [np.asarray(table) for _, table in inputs]
    used = [table[table > 0].tolist() for table in tables]
    assert all(len(set(pages)) == 3 + 2 for pages in used)
    assert len(set(used[0] + used[1])) == 10  # of 12; the third input begins anew
    with pytest.raises(ValueError, match="pool: got 5 pages, allowed: above 5"):
        make_inputs(batch, 16, pool=pool[:5])


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_batches_that_share_a_program_are_all_measured_and_late_ones_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_step, "stream_events", cpu_events)
    monkeypatch.setattr(kernels_attention, "POOL_BYTES", 64e6)
    monkeypatch.setattr(kernels_attention, "BATCHES", (1,))
    monkeypatch.setattr(kernels_attention, "CONTEXTS", (20, 30))
    args = argparse.Namespace(only=["decode 1 x"], implementation="xla")
    cases = kernels_attention.run_model("llama-3.1-8b", args, PEAKS, time.perf_counter() + 600)
    assert [case["batch"] for case in cases] == ["decode 1 x 20", "decode 1 x 30"]
    assert cases[1]["floor_us"] == round(30 * 2 * 8 * 128 * 2 / 1e6, 2)
    assert kernels_attention.run_model("llama-3.1-8b", args, PEAKS, time.perf_counter()) == []
    assert capsys.readouterr().out.count("left out for lack of time") == 2


def test_kernels_are_told_apart_by_run_and_odd_ones_are_refused() -> None:
    assert profile_step.seconds_of_runs([1.0, 2.0, 10.0, 20.0], 2) == [3.0, 30.0]
    for kernels in ([1.0, 2.0, 3.0], []):
        with pytest.raises(ValueError, match="allowed: a multiple of 2 runs"):
            profile_step.seconds_of_runs(kernels, 2)
