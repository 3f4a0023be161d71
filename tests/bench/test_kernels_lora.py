"""The timing of the LoRA kernels runs, and judges by the right bytes, at sizes a CPU can do."""

from __future__ import annotations

import pytest

from bench.floors import Peaks
from bench.kernels_lora import Case, decode_cases, measure, prefill_cases, targets


@pytest.mark.parametrize("num_rows", [6, 300])
def test_a_case_is_measured_and_judged(num_rows: int) -> None:
    case = Case(
        model="demo", group="attention", num_rows=num_rows, rank="16",
        popularity="distinct", num_slots=4, num_layers=2,
    )  # fmt: skip
    peaks = Peaks(read_bytes_per_s=1e6, flops_per_s=1e6)
    (row,) = measure([case], peaks, kernels="xla", num_threads=1)
    # q and o are [128, 128], k and v [64, 128]; each adapter's A and B are read once
    num_bytes = 4 * 2 * 16 * (256 + 192 + 192 + 256)
    assert row["floor_us"] == pytest.approx(num_bytes)
    assert row["us"] > 0
    assert row["target_us"] > 0
    assert row["met"] == (row["us"] <= row["target_us"])


def test_the_targets_shapes_are_all_there() -> None:
    decode, prefill = list(decode_cases()), list(prefill_cases())
    assert {case.rank for case in decode} == {"8", "16", "32", "64", "mixed"}
    assert {case.popularity for case in decode} == {
        "distinct", "uniform", "zipf", "identical", "base-only",
    }  # fmt: skip
    assert {case.num_rows for case in prefill} == {256, 512, 2048, 8192}
    assert {case.num_slots for case in prefill} == {1, 4, 16, 64}


def test_targets_compare_what_they_are_about() -> None:
    us = {"8": 10.0, "16": 20.0, "32": 30.0, "64": 100.0, "mixed": 45.0}
    rows = [
        {"model": "llama-7b", "group": "attention", "num_rows": 64, "rank": rank, "us": time,
         "popularity": "distinct", "num_slots": 64, "floor_us": 1.0,
         "target_us": None if rank == "mixed" else 50.0}
        for rank, time in us.items()
    ]  # fmt: skip
    rows.append(rows[0] | {"popularity": "identical", "us": 11.0, "target_us": None})
    rows += [
        rows[0] | {"num_rows": 2048, "num_slots": slots, "us": time, "rank": "16"}
        for slots, time in ((1, 40.0), (64, 60.0))
    ]
    found = {entry["name"]: entry for entry in targets(rows)}
    assert found["LoRA decode, llama-7b, attention, rank 64, 64 distinct"]["met"] is False
    assert found["LoRA decode, llama-7b, attention, rank 8, 64 distinct"]["met"] is True
    mixed = found["LoRA decode, llama-7b, attention, mixed ranks by the mean of uniform ones"]
    assert (mixed["measured"], mixed["target"], mixed["met"]) == (45.0, "at most 42", False)
    shared = found["LoRA decode, llama-7b, attention, rank 8, one shared"]
    assert (shared["target"], shared["met"]) == ("at most 10", False)
    prefill = found["LoRA prefill, llama-7b, 2048 tokens, rank 16, 1 to 64 adapters"]
    assert (prefill["number"], prefill["measured"], prefill["met"]) == ("2", 60.0, False)


def test_cases_of_one_shape_share_a_program_and_keep_their_own_adapters() -> None:
    cases = [
        Case(
            model="demo", group="attention", num_rows=6, rank=rank, popularity="distinct",
            num_slots=num_slots, num_layers=2,
        )
        for rank, num_slots in (("8", 2), ("64", 6))
    ]  # fmt: skip
    peaks = Peaks(read_bytes_per_s=1e6)
    small, large = measure(cases, peaks, kernels="xla", num_threads=1)
    assert (small["rank"], large["rank"]) == ("8", "64")
    assert large["floor_us"] == pytest.approx(24 * small["floor_us"])
