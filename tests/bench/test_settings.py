"""The paper's settings as its tables have them."""

from __future__ import annotations

import itertools

import pytest

from bench.geometries import GEOMETRIES
from bench.settings import KV_BUDGETS, SETTINGS, SWEEPS


def test_ranks_cycle_in_the_papers_order() -> None:
    assert SETTINGS["S2"].adapter_ranks(6) == [64, 32, 16, 8, 64, 32]
    assert SETTINGS["S4"].adapter_ranks(4) == [64, 32, 16, 64]
    assert SETTINGS["S1"].adapter_ranks(3) == [8, 8, 8]
    assert SETTINGS["S1"].adapter_ranks(0) == []


@pytest.mark.parametrize(
    ("setting", "mib"), [("S1", 16), ("S2", 60), ("S4", 117)], ids=["S1", "S2", "S4"]
)
def test_a_mean_adapter_has_the_size_that_the_paper_gives(setting: str, mib: float) -> None:
    hidden, layers = {"llama-7b": (4096, 32), "llama-13b": (5120, 40)}[SETTINGS[setting].geometry]
    ranks = SETTINGS[setting].ranks
    rank = sum(ranks) / len(ranks)
    num_bytes = len(SETTINGS[setting].modules) * 2 * hidden * rank * layers * 2  # two halves, bf16
    assert num_bytes / 2**20 == pytest.approx(mib, rel=0.01)


def test_the_names_are_those_of_the_issue_and_their_data_is_whole() -> None:
    assert set(SETTINGS) == {"S1", "S2", "S3", "S4", "S5", "S6", "S7", "real"}
    assert all(name == setting.name for name, setting in SETTINGS.items())
    assert SETTINGS["S1"].geometry in GEOMETRIES
    assert [name for name, setting in SETTINGS.items() if setting.is_replayed] == ["real"]


def test_every_sweep_is_of_a_known_setting_and_varies_one_thing_at_a_time() -> None:
    for name, sweep in SWEEPS.items():
        assert sweep.setting in SETTINGS, name
        axes = (sweep.num_adapters, sweep.rates, sweep.alphas, sweep.cvs)
        assert sum(len(axis) > 1 for axis in axes) == 1, name
        for axis in axes:
            assert all(a < b for a, b in itertools.pairwise(axis)), name
    assert all(setting in SETTINGS and budget > 0 for (_, setting), budget in KV_BUDGETS.items())
