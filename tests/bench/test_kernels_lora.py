"""The timing of the LoRA kernels runs, and judges by the right bytes, at sizes a CPU can do."""

from __future__ import annotations

import pytest

from bench.floors import Peaks
from bench.kernels_lora import Case, decode_cases, measure, prefill_cases


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
    assert {case.num_rows for case in prefill} == {512, 2048, 8192}
    assert {case.num_slots for case in prefill} == {1, 4, 16, 64}
