"""Generates traces: the paper's, and the same with other popularities and arrivals.

    python -m bench.workloads --adapters 200 --rate 2 --duration 300 --out trace.jsonl
    python -m bench.workloads --adapters 200 --rate 2 --alpha 0.3 --cv 4 --out skewed.jsonl
    python -m bench.workloads --adapters 200 --arrivals bursty --zipf 1.1 --out bursty.jsonl
    python -m bench.workloads --replay BurstGPT_1.csv --drop-failed --rate 2 --adapters 200 \\
        --out replayed.jsonl

writes a trace (see `bench.trace_files`) and prints what it asks of a server; `generate` is the
same for Python. Drawn from NumPy's RandomState, whose streams are frozen, in the order of the
original generator: a gamma/power-law workload is the very trace that the paper ran, with its
seed 42, except that arrivals are rounded to microseconds, which also takes away what the
mathematical functions of platforms differ by.

What to know about it (the original's semantics, kept):

- int(rate * duration_s) requests, however long they take to arrive.
- Adapter floor(n * X), X of density alpha * x^(alpha - 1): alpha = 1 is *uniform* popularity, and
  the smaller alpha, the more adapter 0 is asked for; P(i) = ((i+1)/n)^alpha - (i/n)^alpha.
- Lengths are uniform over [from, to), independently of each other and of the adapter.
- Gaps are gamma with shape 1/cv^2 and mean 1/rate; cv = 1 is a Poisson process.
- No adapters means the base model for every request, at the same moments and lengths as with any
  number of adapters and the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from bench.popularity import assign_adapters, draw_adapters, tenant_of
from bench.settings import LENGTHS
from bench.trace import (
    Request,
    adapters_by_tenant,
    at_rate,
    downsample,
    merge,
    summarise,
)
from bench.trace_files import read_trace, write_trace

Arrivals = Literal["gamma", "bursty", "diurnal"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What to generate. Rates are in requests per second and lengths in tokens, [from, to)."""

    rate: float
    duration_s: float
    num_adapters: int  # 0: the base model alone
    alpha: float = 1.0  # of the paper's power law; 1 is uniform
    zipf: float | None = None  # instead of it: P(i) in proportion to (i + 1)^-zipf; 0 is uniform
    base_share: float = 0.0  # of requests to the base model, beside those to adapters
    num_tenants: int | None = None  # adapter i belongs to tenant i % num_tenants; else one for each
    input_range: tuple[int, int] = LENGTHS
    output_range: tuple[int, int] = LENGTHS
    arrivals: Arrivals = "gamma"
    cv: float = 1.0  # coefficient of variation of the gaps
    on_s: float = 10.0  # bursty: a burst, then quiet, again and again
    off_s: float = 30.0
    period_s: float | None = None  # diurnal: a day, from its quietest moment; the duration if None
    trough: float = 0.1  # rate in the quiet, in parts of `rate`, which is the mean
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises ValueError: what, got, allowed."""
        for name in ("rate", "duration_s", "alpha", "cv", "on_s", "off_s"):
            self._check(name, getattr(self, name) > 0, "above 0")
        self._check("period_s", self.period_s is None or self.period_s > 0, "above 0")
        self._check("zipf", self.zipf is None or self.zipf >= 0, "at least 0")
        self._check("num_adapters", self.num_adapters >= 0, "at least 0")
        self._check("num_tenants", self.num_tenants is None or self.num_tenants > 0, "above 0")
        self._check("base_share", 0 <= self.base_share <= 1, "0 to 1")
        self._check("trough", 0 <= self.trough <= 1, "0 to 1")
        self._check("arrivals", self.arrivals in get_args(Arrivals), str(get_args(Arrivals)))
        self._check("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        for name in ("input_range", "output_range"):
            low, high = getattr(self, name)
            self._check(name, 1 <= low < high, "1 <= from < to")

    def _check(self, name: str, is_allowed: bool, allowed: str) -> None:
        if not is_allowed:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed: {allowed}")

    @property
    def num_requests(self) -> int:
        return int(self.rate * self.duration_s)


def generate(workload: Workload) -> list[Request]:
    """The trace of a workload, by arrival. The order of the draws is part of the semantics."""
    rng = np.random.RandomState(workload.seed)
    num = workload.num_requests
    adapters = draw_adapters(
        rng, num, max(workload.num_adapters, 1), alpha=workload.alpha, zipf=workload.zipf
    )
    prompts = rng.randint(*workload.input_range, num, dtype=np.int64)
    outputs = rng.randint(*workload.output_range, num, dtype=np.int64)
    arrivals = _arrivals(workload, rng, num)
    is_base = rng.random_sample(num) < workload.base_share  # last: moves no draw of the original
    if workload.num_adapters == 0:
        is_base[:] = True
    found = []
    for adapter, prompt, output, arrival, base in zip(
        adapters.tolist(), prompts.tolist(), outputs.tolist(), arrivals.tolist(), is_base.tolist(),
        strict=True,
    ):  # fmt: skip
        number = None if base else adapter
        found.append(
            Request(
                arrival_s=arrival, adapter=number, tenant=tenant_of(number, workload.num_tenants),
                num_prompt_tokens=prompt, num_output_tokens=output,
            )
        )  # fmt: skip
    return found


def flooded(workload: Workload, factor: float, adapter: int = 0) -> list[Request]:
    """The trace of a workload, every request as it is, and besides them requests to one adapter at
    `factor` times the mean rate of a tenant. Raises ValueError if there is no adapter.
    """
    workload._check("num_adapters", workload.num_adapters > 0, "above 0, for a flood")
    num_tenants = workload.num_tenants or workload.num_adapters
    flood = generate(
        dataclasses.replace(
            workload, rate=factor * workload.rate / num_tenants, num_adapters=1, base_share=0.0,
            seed=(workload.seed + 1) % 2**32,
        )
    )  # fmt: skip
    tenant = tenant_of(adapter, workload.num_tenants)
    return merge(
        generate(workload), [dataclasses.replace(r, adapter=adapter, tenant=tenant) for r in flood]
    )


def _arrivals(workload: Workload, rng: np.random.RandomState, num: int) -> np.ndarray:
    """Seconds, f64 [num]. Where the rate changes, the gaps are gamma in expected arrivals: the
    process is the steady one with its clock bent.
    """
    shape = 1 / (workload.cv * workload.cv)
    scale = workload.cv * workload.cv / workload.rate
    steady = np.cumsum(rng.gamma(shape, scale, num))
    if workload.arrivals == "gamma":
        return np.round(steady, 6)
    return np.round(_moment(workload, steady), 6)


def steady_time(workload: Workload, at_s: np.ndarray) -> np.ndarray:
    """Arrivals expected by each moment, in seconds of the mean rate: f64, rising with `at_s`.

    Its slope is the rate at that moment in parts of the mean.
    """
    if workload.arrivals == "gamma":
        return at_s
    if workload.arrivals == "bursty":
        whole, rest = np.divmod(at_s, workload.on_s + workload.off_s)
        burst = np.minimum(rest, workload.on_s) * _burst(workload)
        quiet = np.maximum(rest - workload.on_s, 0) * workload.trough
        return np.asarray(whole * (workload.on_s + workload.off_s) + burst + quiet)
    turn = 2 * np.pi / (workload.period_s or workload.duration_s)
    return np.asarray(at_s - (1 - workload.trough) * np.sin(turn * at_s) / turn)


def _burst(workload: Workload) -> float:
    """The rate in a burst in parts of the mean."""
    return 1 + (1 - workload.trough) * workload.off_s / workload.on_s


def _moment(workload: Workload, steady: np.ndarray) -> np.ndarray:
    """The inverse of `steady_time`."""
    if workload.arrivals == "bursty":
        whole, rest = np.divmod(steady, workload.on_s + workload.off_s)
        burst_total = workload.on_s * _burst(workload)
        burst = np.minimum(rest, burst_total) / _burst(workload)
        quiet = np.maximum(rest - burst_total, 0) / (workload.trough or 1.0)
        return np.asarray(whole * (workload.on_s + workload.off_s) + burst + quiet)
    period = workload.period_s or workload.duration_s
    low, high = steady - period, steady + period
    for _ in range(64):  # bisection, to the last bit
        middle = (low + high) / 2
        is_early = steady_time(workload, middle) < steady
        low, high = np.where(is_early, middle, low), np.where(is_early, high, middle)
    return np.asarray(high)


def main() -> None:
    args = _parse()
    try:
        trace = _replayed(args) if args.replay else _generated(args)
        if not trace:
            raise ValueError("no request: rate * duration is below 1")
        summary = summarise(trace, window_s=args.window, saturated_rate=args.saturated_rate)
    except (OSError, ValueError) as exc:
        raise SystemExit(f"bench.workloads: {exc}") from exc
    if args.out is not None:
        chosen = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        write_trace(args.out, trace, {k: v for k, v in chosen.items() if k != "out"})
    print(json.dumps(summary, indent=1))


def _generated(args: argparse.Namespace) -> list[Request]:
    num_adapters = 200 if args.adapters is None else args.adapters
    workload = Workload(
        rate=args.rate, duration_s=args.duration, num_adapters=num_adapters, alpha=args.alpha,
        zipf=args.zipf, base_share=args.base_share, num_tenants=args.tenants,
        input_range=tuple(args.input), output_range=tuple(args.output), arrivals=args.arrivals,
        cv=args.cv, on_s=args.on, off_s=args.off, period_s=args.period, trough=args.trough,
        seed=args.seed,
    )  # fmt: skip
    return generate(workload) if args.flood is None else flooded(workload, args.flood)


def _replayed(args: argparse.Namespace) -> list[Request]:
    trace = read_trace(args.replay, drop_failed=args.drop_failed, limit=args.limit)
    if args.whole:
        trace = at_rate(trace, args.rate)
    else:
        trace = downsample(
            trace, requests_per_s=args.rate, duration_s=args.duration, seed=args.seed,
            max_prompt_tokens=args.input[1] - 1, max_output_tokens=args.output[1] - 1,
        )  # fmt: skip
    if args.adapter_per_tenant:
        return adapters_by_tenant(trace)
    if args.adapters is None:
        return trace
    return assign_adapters(
        trace, args.adapters, alpha=args.alpha, zipf=args.zipf, seed=args.seed,
        num_tenants=args.tenants,
    )  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--adapters", type=int, help="200 if left out, or with --replay those of the file")
    add("--adapter-per-tenant", action="store_true", help="replay: instead of --adapters")
    add("--rate", type=float, default=2.0, help="requests per second")
    add("--duration", type=float, default=300.0, help="seconds")
    add("--alpha", type=float, default=1.0, help="of the power law of popularity; 1 is uniform")
    add("--zipf", type=float, help="Zipf's exponent, instead of alpha; 0 is uniform")
    add("--flood", type=float, help="adapter 0 is asked for so many times the mean besides")
    add("--base-share", type=float, default=0.0)
    add("--tenants", type=int, help="that share the adapters; else one for each adapter")
    add("--input", type=int, nargs=2, default=LENGTHS, metavar=("FROM", "TO"))
    add("--output", type=int, nargs=2, default=LENGTHS, metavar=("FROM", "TO"))
    add("--arrivals", choices=get_args(Arrivals), default="gamma")
    add("--cv", type=float, default=1.0, help="of the gaps; 1 is Poisson")
    add("--on", type=float, default=10.0, help="bursty: seconds of a burst")
    add("--off", type=float, default=30.0, help="bursty: seconds of quiet")
    add("--period", type=float, help="diurnal: seconds of a day; the duration if left out")
    add("--trough", type=float, default=0.1, help="rate in the quiet over the mean rate")
    add("--seed", type=int, default=42)
    add("--replay", type=Path, help="a recorded trace instead: CSV or JSONL")
    add("--whole", action="store_true", help="replay every request, at --rate")
    add("--drop-failed", action="store_true", help="replay: leave out requests without an output")
    add("--limit", type=int, help="replay: read no more than the first requests")
    add("--window", type=float, default=10.0, help="seconds over which adapters are counted")
    add("--saturated-rate", type=float, help="of the base, requests/s: the load is printed")
    add("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
