"""The generator draws what the paper says: against closed forms, each at a confidence that a right
generator fails with a chance below one in a million, and against the original's own draws.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest

from bench import workloads
from bench.popularity import assign_adapters
from bench.trace import Request, digest
from bench.trace_files import read_trace
from bench.workloads import Workload, flooded, steady_time

generate = functools.cache(workloads.generate)

SIGMAS = 5.0  # of a normal variable: 6e-7
NUM = 20_000
MANY = Workload(rate=100.0, duration_s=NUM / 100.0, num_adapters=20)


def chi_square_limit(num_cells: int) -> float:
    """Exceeded by chi-square of num_cells - 1 degrees with a chance below e^-16 = 1e-7
    (Laurent and Massart, 2000).
    """
    free, x = num_cells - 1, 16.0
    return float(free + 2 * np.sqrt(free * x) + 2 * x)


def check_counts(drawn: np.ndarray, chances: np.ndarray) -> None:
    expected = len(drawn) * chances
    assert expected.min() > 5  # else the statistic is not chi-square
    counts = np.bincount(drawn, minlength=len(chances))
    assert len(counts) == len(chances)
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(len(chances))


def column(trace: list[Request], name: str) -> np.ndarray:
    return np.array([getattr(request, name) for request in trace])


def test_a_trace_is_the_very_one_that_the_original_draws_from_its_seed() -> None:
    workload = Workload(rate=2.0, duration_s=60.0, num_adapters=200, alpha=0.3, cv=4.0)
    np.random.seed(42)
    shares = np.random.power(0.3, 120)
    prompts = np.random.randint(8, 512, 120)
    outputs = np.random.randint(8, 512, 120)
    gaps = np.random.gamma(1 / 16, 16 / 2.0, 120)
    clock = 0.0
    for request, share, prompt, output, gap in zip(
        generate(workload), shares, prompts, outputs, gaps, strict=True
    ):
        clock += gap
        assert request.arrival_s == pytest.approx(clock, abs=5.1e-7)
        assert request.adapter == int(share * 200)
        assert (request.num_prompt_tokens, request.num_output_tokens) == (prompt, output)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "00db98c945334518"),
        ({"zipf": 1.1, "arrivals": "bursty"}, "8fcdabd54af5445a"),
        (
            {"cv": 4.0, "arrivals": "diurnal", "num_tenants": 3, "base_share": 0.2},
            "a991de76e11aebdd",
        ),
    ],
    ids=["paper", "bursty", "diurnal"],
)
def test_a_seed_means_one_trace_on_every_platform(
    changes: dict[str, object], expected: str
) -> None:
    workload = Workload(rate=2.0, duration_s=300.0, num_adapters=200)
    assert digest(generate(dataclasses.replace(workload, **changes))) == expected  # type: ignore[arg-type]


def test_another_seed_is_another_trace_and_the_same_seed_the_same() -> None:
    assert workloads.generate(MANY) == generate(MANY)
    assert digest(generate(MANY)) != digest(generate(dataclasses.replace(MANY, seed=43)))


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.6, 1.0])
def test_adapters_are_as_popular_as_the_power_law_says(alpha: float) -> None:
    drawn = column(generate(dataclasses.replace(MANY, alpha=alpha)), "adapter")
    check_counts(drawn, np.diff((np.arange(21) / 20) ** alpha))


def test_popularity_has_the_shares_that_are_known_of_the_papers_skews() -> None:
    for alpha, top_1, top_10 in ((0.1, 0.59, 0.74), (0.3, 0.21, 0.41), (1.0, 0.005, 0.05)):
        workload = dataclasses.replace(MANY, num_adapters=200, alpha=alpha)
        drawn = column(generate(workload), "adapter")
        for number, share in ((1, top_1), (10, top_10)):
            rounding = 0.005
            error = SIGMAS * np.sqrt(share * (1 - share) / NUM)
            assert np.mean(drawn < number) == pytest.approx(share, abs=rounding + error)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.5])
def test_adapters_are_as_popular_as_zipf_says(exponent: float) -> None:
    drawn = column(generate(dataclasses.replace(MANY, zipf=exponent)), "adapter")
    weights = 1 / np.arange(1, 21) ** exponent
    check_counts(drawn, weights / weights.sum())


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(cv: float) -> None:
    gaps = np.diff(column(generate(dataclasses.replace(MANY, cv=cv)), "arrival_s"), prepend=0.0)
    mean, kurtosis = 1 / 100.0, 3 + 6 * cv**2  # of a gamma variable with shape 1/cv^2
    variance = (cv * mean) ** 2
    assert gaps.mean() == pytest.approx(mean, abs=SIGMAS * np.sqrt(variance / NUM))
    error = SIGMAS * variance * np.sqrt((kurtosis - 1) / NUM)
    assert gaps.var() == pytest.approx(variance, abs=error)
    assert (gaps >= 0).all()


def test_poisson_arrivals_forget() -> None:
    counts = np.bincount(column(generate(MANY), "arrival_s").astype(int))[:190]
    dispersion = counts.var() / counts.mean()  # 1 for Poisson counts, error sqrt(2/n)
    assert dispersion == pytest.approx(1.0, abs=SIGMAS * np.sqrt(2 / len(counts)))


def test_lengths_are_uniform_without_their_upper_end_and_independent() -> None:
    trace = generate(dataclasses.replace(MANY, input_range=(8, 40), output_range=(100, 116)))
    check_counts(column(trace, "num_prompt_tokens") - 8, np.full(32, 1 / 32))
    check_counts(column(trace, "num_output_tokens") - 100, np.full(16, 1 / 16))
    columns = ("adapter", "num_prompt_tokens", "num_output_tokens")
    correlations = np.corrcoef([column(trace, name) for name in columns])
    assert np.abs(correlations - np.eye(3)).max() < SIGMAS / np.sqrt(NUM)


def test_the_base_alone_gets_the_same_arrivals_and_lengths() -> None:
    base = generate(dataclasses.replace(MANY, num_adapters=0))
    assert all(request.adapter is None and request.tenant == "base" for request in base)
    for name in ("arrival_s", "num_prompt_tokens", "num_output_tokens"):
        for num_adapters in (1, 20):
            trace = generate(dataclasses.replace(MANY, num_adapters=num_adapters))
            assert (column(trace, name) == column(base, name)).all()


def test_a_share_for_the_base_takes_from_every_adapter_alike_and_moves_nothing_else() -> None:
    whole, mixed = generate(MANY), generate(dataclasses.replace(MANY, base_share=0.25))
    kept = [(a, b) for a, b in zip(whole, mixed, strict=True) if b.adapter is not None]
    assert all(a == b for a, b in kept)
    error = SIGMAS * np.sqrt(0.25 * 0.75 / NUM)
    assert 1 - len(kept) / NUM == pytest.approx(0.25, abs=error)
    check_counts(np.array([b.adapter for _, b in kept]), np.full(20, 1 / 20))


def test_tenants_share_the_adapters_by_number() -> None:
    trace = generate(dataclasses.replace(MANY, num_tenants=3))
    assert all(request.tenant == f"tenant-{(request.adapter or 0) % 3}" for request in trace)
    assert generate(MANY)[0].tenant == f"adapter-{generate(MANY)[0].adapter}"


VARYING = [
    Workload(rate=20.0, duration_s=1000.0, num_adapters=2, arrivals="bursty", trough=trough)
    for trough in (0.0, 0.3, 1.0)
] + [
    Workload(rate=20.0, duration_s=1000.0, num_adapters=2, arrivals="diurnal", trough=trough,
             period_s=250.0)
    for trough in (0.0, 0.5)
]  # fmt: skip


@pytest.mark.parametrize("workload", VARYING, ids=lambda w: f"{w.arrivals}-{w.trough}")
def test_varying_rates_are_the_steady_process_with_its_clock_bent(workload: Workload) -> None:
    steady = column(generate(dataclasses.replace(workload, arrivals="gamma")), "arrival_s")
    bent = column(generate(workload), "arrival_s")
    assert (np.diff(bent) >= 0).all()
    steepest = np.max(np.diff(steady_time(workload, np.arange(0, 250, 0.01)))) / 0.01
    assert np.abs(steady_time(workload, bent) - steady).max() < 1e-6 * (1 + steepest)


@pytest.mark.parametrize("workload", VARYING, ids=lambda w: f"{w.arrivals}-{w.trough}")
def test_the_mean_rate_over_a_period_is_the_rate_and_the_quietest_is_the_trough(
    workload: Workload,
) -> None:
    period = 250.0 if workload.arrivals == "diurnal" else 40.0
    clock = np.linspace(0, 3 * period, 120_001)
    slope = np.diff(steady_time(workload, clock)) / np.diff(clock)
    assert slope.mean() == pytest.approx(1.0, rel=1e-9)
    assert slope.min() == pytest.approx(workload.trough, abs=1e-4)
    assert np.allclose(slope[:40_000], slope[40_000:80_000], atol=1e-6)


def test_a_burst_has_its_share_of_the_arrivals() -> None:
    silent, quiet = VARYING[0], VARYING[1]
    assert (column(generate(silent), "arrival_s") % 40 <= 10.0).all()
    times = column(generate(quiet), "arrival_s")
    whole = times[times < 960]
    share = 1 - 0.3 * 30 / 40
    error = SIGMAS * np.sqrt(share * (1 - share) / len(whole))
    assert np.mean(whole % 40 < 10) == pytest.approx(share, abs=error)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("rate", 0.0, "above 0"), ("rate", float("nan"), "above 0"), ("duration_s", -1.0, "above"),
        ("alpha", 0.0, "above 0"), ("cv", 0.0, "above 0"), ("zipf", -0.1, "at least 0"),
        ("num_adapters", -1, "at least 0"), ("base_share", 1.1, "0 to 1"),
        ("trough", -0.1, "0 to 1"), ("input_range", (8, 8), "from < to"),
        ("output_range", (0, 4), "1 <="), ("seed", -1, "0 to"), ("arrivals", "late", "gamma"),
        ("num_tenants", 0, "above 0"), ("period_s", 0.0, "above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: got .*allowed: .*{allowed}"):
        dataclasses.replace(MANY, **{field: value})  # type: ignore[arg-type]


def test_a_recorded_trace_gets_adapters_by_the_same_law() -> None:
    plain = generate(dataclasses.replace(MANY, num_adapters=0))
    trace = assign_adapters(plain, 20, alpha=0.3)
    check_counts(column(trace, "adapter"), np.diff((np.arange(21) / 20) ** 0.3))
    assert column(trace, "arrival_s").tolist() == column(plain, "arrival_s").tolist()
    assert assign_adapters(trace, 0) == plain


@pytest.mark.parametrize("num_tenants", [None, 5])
def test_a_flood_comes_on_top_of_the_same_requests_at_its_rate(num_tenants: int | None) -> None:
    workload = dataclasses.replace(MANY, num_tenants=num_tenants)
    both = collections.Counter(flooded(workload, 20.0, adapter=3))
    flood = both - collections.Counter(generate(workload))
    assert both - flood == collections.Counter(generate(workload))
    assert flood.total() == 20 * NUM // (num_tenants or 20)
    assert {(r.adapter, r.tenant) for r in flood} == {
        (3, "adapter-3" if num_tenants is None else "tenant-3")
    }
    with pytest.raises(ValueError, match="num_adapters: got 0, allowed: above 0"):
        flooded(dataclasses.replace(MANY, num_adapters=0), 20.0)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["bench.workloads", *map(str, words)])
    workloads.main()


def test_the_command_writes_what_it_says_and_replays_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.jsonl"
    run(monkeypatch, "--adapters", 8, "--rate", 4, "--duration", 50, "--out", out)
    summary = json.loads(capsys.readouterr().out)
    workload = Workload(rate=4.0, duration_s=50.0, num_adapters=8)
    assert read_trace(out) == generate(workload)
    assert summary["digest"] == digest(generate(workload))
    run(monkeypatch, "--replay", out, "--whole", "--rate", 8, "--saturated-rate", 16)
    replayed = json.loads(capsys.readouterr().out)
    assert (replayed["num_requests"], replayed["num_adapters"]) == (200, 8)
    assert replayed["load"] == pytest.approx(0.5, rel=1e-5)
    run(monkeypatch, "--replay", out, "--rate", 1, "--duration", 50, "--adapters", 3)
    assert json.loads(capsys.readouterr().out)["num_adapters"] == 3
    burst = tmp_path / "burst.csv"
    rows = [f"{second},{'GPT-4' if second % 3 else 'ChatGPT'},9,9,18,x" for second in range(99)]
    names = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    burst.write_text("\n".join([names, *rows, "99,ChatGPT,9,0,9,x"]) + "\n")
    run(monkeypatch, "--replay", burst, "--drop-failed", "--rate", 2, "--duration", 20,
        "--adapter-per-tenant", "--out", out)  # fmt: skip
    assert json.loads(capsys.readouterr().out)["num_adapters"] == 2
    assert {(r.adapter, r.tenant) for r in read_trace(out)} in (
        {(0, "ChatGPT"), (1, "GPT-4")}, {(1, "ChatGPT"), (0, "GPT-4")},
    )  # fmt: skip
    assert (len(read_trace(out)), read_trace(out)[-1].arrival_s) == (40, 20.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0"], "rate: got 0.0"),
        (["--rate", "0.1", "--duration", "1"], "no request"),
        (["--replay", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *words)
