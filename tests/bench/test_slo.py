"""Objectives: the paper's definitions, and what must hold of any of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import slo
from bench.outcome import Outcome, gap_quantiles
from bench.records import RecordFile
from bench.slo import (
    attainment,
    goodput,
    meets,
    quantiles,
    satisfaction,
    stripped_throughput,
    summarise,
    table,
    throughput,
    wall_s,
)
from tests.bench.outcomes import OUTCOMES, outcome

SLOS = st.integers(1, 80).map(lambda eighths: eighths / 8)
LAW = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("after_s", "attained", "satisfied"),
    [
        (0.0, 1, 1.0),
        (3.0, 1, 0.75),
        (5.999, 1, 1 - (5.999 / 6) ** 2),
        (6.0, 0, 0.0),
        (60.0, 0, 0.0),
    ],
)
def test_one_request_is_judged_as_the_paper_does(
    after_s: float, attained: int, satisfied: float
) -> None:
    assert attainment([outcome(after_s=after_s)]) == attained
    assert satisfaction([outcome(after_s=after_s)]) == pytest.approx(satisfied, abs=1e-12)


@given(OUTCOMES, SLOS, SLOS)
@LAW
def test_an_easier_objective_is_met_by_no_fewer(
    outcomes: list[Outcome], one: float, other: float
) -> None:
    tight, loose = sorted((one, other))
    assert 0 <= attainment(outcomes, tight) <= attainment(outcomes, loose) <= 1
    assert 0 <= satisfaction(outcomes, tight) <= satisfaction(outcomes, loose) + 1e-12 <= 1 + 1e-12
    assert goodput(outcomes, tight) <= goodput(outcomes, loose) <= throughput(outcomes)
    assert goodput(outcomes, loose, tight) <= goodput(outcomes, loose)


@given(OUTCOMES, SLOS)
@LAW
def test_no_one_is_more_satisfied_than_served(outcomes: list[Outcome], slo_s: float) -> None:
    assert satisfaction(outcomes, slo_s) <= attainment(outcomes, slo_s)


@given(OUTCOMES, st.lists(st.integers(0, 50), max_size=8), SLOS)
@LAW
def test_failures_dilute_the_shares_by_exactly_their_number(
    outcomes: list[Outcome], fails: list[int], slo_s: float
) -> None:
    failed = [outcome(arrival_s=at / 8, after_s=None) for at in fails]
    ratio = len(outcomes) / (len(outcomes) + len(fails))
    for measure in (attainment, satisfaction):
        assert measure([*outcomes, *failed], slo_s) == pytest.approx(
            measure(outcomes, slo_s) * ratio
        )


@given(OUTCOMES, st.randoms(use_true_random=False))
@LAW
def test_the_order_of_records_means_nothing(outcomes: list[Outcome], random: object) -> None:
    shuffled = list(outcomes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = summarise(outcomes), summarise(shuffled)
    for key in ("wall_s", "num_finished", "requests_per_s", "errors"):
        assert one[key] == other[key]
    for key in ("first_token_s", "per_token_s"):
        assert (one[key] is None) == (other[key] is None)
        if one[key] is not None:
            assert one[key] == pytest.approx(other[key])


def test_a_request_that_failed_after_its_first_token_attains_nothing() -> None:
    broken = outcome(after_s=0.5, error="disconnect: gone")
    assert attainment([broken]) == satisfaction([broken]) == goodput([broken]) == 0
    assert summarise([broken])["output_tokens_per_s"] == 5 / broken.ended_s


def test_goodput_counts_those_within_both_limits_over_the_wall_time() -> None:
    fast = outcome(0, 0.0, 0.5, gap_s=0.25)
    slow_start = outcome(1, 0.0, 2.0, gap_s=0.25)
    slow_tokens = outcome(2, 0.0, 0.5, gap_s=2.5)
    single = outcome(3, 0.0, 0.5, tokens=1)
    all_four = [fast, slow_start, slow_tokens, single]
    assert wall_s(all_four) == 10.5
    assert goodput(all_four, 1.0) == 3 / 10.5
    assert goodput(all_four, 1.0, 0.5) == 2 / 10.5
    assert throughput(all_four) == 4 / 10.5
    assert not meets(fast, 0.5) and not meets(fast, 1.0, 0.25)  # "within" is below


def test_first_token_times_count_from_arrival_not_from_sending() -> None:
    late = outcome(arrival_s=2.0, after_s=3.0, sent_s=4.0)
    assert late.first_token_after_s == 3.0
    assert summarise([late])["sent_late_s"]["p50"] == 2.0


def test_wall_time_is_that_of_each_part_of_a_resumed_run() -> None:
    first = [outcome(0, 1.0, 1.0, tokens=1), outcome(1, 3.0, 2.0, tokens=1)]
    second = [outcome(2, 10.0, 1.0, tokens=1, segment=1), outcome(3, 12.0, 2.0, segment=1)]
    assert wall_s(first) == 5.0
    assert wall_s(first + second) == 5.0 + (16.0 - 10.0)
    assert "resumed run" in table(summarise(first + second))
    assert "resumed run" not in table(summarise(first))


def test_strip_throughput_is_the_originals() -> None:
    outcomes = [outcome(i, float(i), 1.0, tokens=1) for i in range(100)]  # 1 request/s, 100 s
    assert stripped_throughput(outcomes, 1.0) == (100 - 2 * 10) / (100 - 2 * 10)
    assert stripped_throughput(outcomes[:15], 1.0) is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
@LAW
def test_quantiles_rise_and_are_those_of_sorting(values: list[float]) -> None:
    found = quantiles(values)
    assert found is not None
    assert found["p50"] <= found["p90"] <= found["p99"] <= found["max"] == max(values)
    below = np.searchsorted(np.sort(values), found["p90"], side="right")
    assert below >= np.floor(0.9 * (len(values) - 1)) + 1
    assert quantiles([]) is None


def test_gaps_are_those_between_neighbours() -> None:
    assert gap_quantiles([1.0, 1.5, 3.5]) == {"p50": 1.25, "p90": 1.85, "p99": 1.985, "max": 2.0}
    assert gap_quantiles([1.0]) is None


def test_moments_that_were_not_kept_are_spread_evenly() -> None:
    one = outcome(arrival_s=1.0, after_s=1.0, tokens=5, gap_s=0.5)
    assert one.token_moments.tolist() == [2.0, 2.5, 3.0, 3.5, 4.0]
    one.token_s = [2.0, 2.1, 2.2, 2.3, 4.0]
    assert one.token_moments.tolist() == one.token_s
    one.token_s = [2.0, 4.0]  # events of several tokens
    assert one.token_moments.tolist() == [2.0, 2.5, 3.0, 3.5, 4.0]
    assert outcome(after_s=None).token_moments.size == 0


def test_a_summary_counts_errors_by_kind_and_short_answers() -> None:
    outcomes = [
        outcome(0), outcome(1, after_s=None), outcome(2, after_s=None, error="timeout: 5 s"),
        outcome(3, num_output_tokens=3),
    ]  # fmt: skip
    summary = summarise(outcomes)
    assert summary["errors"] == {"http": 1, "timeout": 1}
    assert (summary["num_requests"], summary["num_finished"], summary["num_short"]) == (4, 2, 1)
    text = table(summary)
    assert "2 of 4 finished; failed: 1 http, 1 timeout" in text
    assert "WARNING        1 answers of another length" in text


def test_nothing_has_no_share() -> None:
    with pytest.raises(ValueError, match="got no outcomes"):
        attainment([])


def test_the_command_prints_the_summary_of_a_record_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    outcomes = [outcome(i, float(i), 0.5 * i) for i in range(8)]
    with RecordFile.create(path, {"bench": "serving"}) as file:
        for one in outcomes:
            file.append(one.record())
        assert [Outcome.from_record(dataclasses.asdict(one)) for one in outcomes] == outcomes
    monkeypatch.setattr("sys.argv", ["bench.slo", str(path), "--slo", "2", "--per-token-slo", "1"])
    slo.main()
    assert "SLO 2s         attainment 0.500" in capsys.readouterr().out
    for content in ('{"header": {}}\n', '{"header": {}}\n{"i": 1}\n'):
        path.write_text(content)
        with pytest.raises(SystemExit, match=r"bench\.slo: .*allowed: "):
            slo.main()
