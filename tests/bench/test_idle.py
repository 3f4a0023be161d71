"""What idle time is made of."""

from __future__ import annotations

import pytest

from bench.idle import covered_s, idle_share, row_targets


def test_time_without_a_kernel_is_the_window_less_the_union_of_spans() -> None:
    spans = [(0.0, 10e9), (2e9, 4e9), (9e9, 12e9), (15e9, 20e9)]
    assert covered_s(spans) == pytest.approx(17) and idle_share(spans) == pytest.approx(3 / 20)
    assert covered_s(spans[:1]) == pytest.approx(10) and idle_share(spans[:1]) == pytest.approx(0)
    assert idle_share([]) == 1


def test_idle_is_judged_by_the_number_of_rows() -> None:
    measured = {"rows": 1, "idle": 0.04, "raw_over_engine": 0.96}
    assert [entry["met"] for entry in row_targets(measured)] == [True, False]
    assert [entry["met"] for entry in row_targets(measured | {"rows": 256})] == [False, False]
    assert row_targets(measured | {"rows": 7}) == []
