"""Throughput, latency and how far a service-level objective (SLO) was met, from outcomes.

    python -m bench.slo bench/results/.../serving.jsonl --slo 6 1 --per-token-slo 0.1

prints the summary of a record file. The paper's objective is a first token within 6 s of arrival.
Failed and aborted requests count as requests that got nothing: they lower every share.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.outcome import Outcome
from bench.records import RecordError, read_records
from bench.settings import SLO_S

STRIP_S = 10.0  # the original leaves out this much of requests and of time at both ends


def attainment(outcomes: Sequence[Outcome], slo_s: float = SLO_S) -> float:
    """The share of requests whose first token came within less than `slo_s` of arrival."""
    return _mean(outcomes, lambda after_s: after_s < slo_s)


def satisfaction(outcomes: Sequence[Outcome], slo_s: float = SLO_S) -> float:
    """The paper's measure, the mean of 1 - (t / slo_s)^2, never below 0: 1 for a first token at
    once, 0 for one at `slo_s` or none.
    """
    return _mean(outcomes, lambda after_s: max(0.0, 1 - (after_s / slo_s) ** 2))


def _mean(outcomes: Sequence[Outcome], worth: Callable[[float], float]) -> float:
    if not outcomes:
        raise ValueError("got no outcomes, allowed: at least one")
    firsts = [outcome.first_token_after_s for outcome in outcomes]
    return sum(float(worth(first)) for first in firsts if first is not None) / len(outcomes)


def meets(outcome: Outcome, slo_s: float, per_token_slo_s: float | None = None) -> bool:
    """Whether a request finished with its first token, and if asked its mean time between tokens,
    within the objective.
    """
    first, between = outcome.first_token_after_s, outcome.per_token_s
    is_slow = per_token_slo_s is not None and between is not None and between >= per_token_slo_s
    return first is not None and first < slo_s and not is_slow


def goodput(
    outcomes: Sequence[Outcome], slo_s: float = SLO_S, per_token_slo_s: float | None = None
) -> float:
    """Requests per second, of those that met the objective."""
    return sum(meets(outcome, slo_s, per_token_slo_s) for outcome in outcomes) / wall_s(outcomes)


def wall_s(outcomes: Sequence[Outcome]) -> float:
    """Seconds from the start of the trace to the last end, drain included. A run resumed counts
    each of its parts, from the part's first arrival.
    """
    begins: dict[int, float] = {0: 0.0}
    ends: dict[int, float] = collections.defaultdict(float)
    for outcome in outcomes:
        part = outcome.segment
        begins[part] = min(begins.get(part, outcome.arrival_s), outcome.arrival_s)
        ends[part] = max(ends[part], outcome.ended_s)
    return sum(end - begins[part] for part, end in ends.items())


def throughput(outcomes: Sequence[Outcome]) -> float:
    """Finished requests per second, drain included (the paper's throughput)."""
    return sum(outcome.is_finished for outcome in outcomes) / wall_s(outcomes)


def stripped_throughput(outcomes: Sequence[Outcome], offered_rate: float) -> float | None:
    """The paper's "strip" throughput: `STRIP_S` of requests, at the offered rate, and of time taken
    off at both ends; None if nothing is left.
    """
    finished = sum(outcome.is_finished for outcome in outcomes)
    left, left_s = finished - 2 * int(offered_rate * STRIP_S), wall_s(outcomes) - 2 * STRIP_S
    return left / left_s if left > 0 and left_s > 0 else None


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, p90, p99 and maximum; None of nothing."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    found = {"mean": np.mean(values), "p50": p50, "p90": p90, "p99": p99, "max": np.max(values)}
    return {name: float(value) for name, value in found.items()}


def summarise(
    outcomes: Sequence[Outcome],
    *,
    slos_s: Sequence[float] = (SLO_S, 1.0),
    per_token_slo_s: float | None = None,
) -> dict[str, Any]:
    """Everything above, of one run. Token rates count what failed requests had got, too."""
    wall = wall_s(outcomes)
    tokens = sum(outcome.num_output_tokens for outcome in outcomes)
    prompts = sum(outcome.num_prompt_tokens for outcome in outcomes if outcome.is_finished)
    sent = [(outcome.sent_s, outcome.arrival_s) for outcome in outcomes]
    errors = collections.Counter(outcome.error_kind for outcome in outcomes if outcome.error)
    return {
        "num_requests": len(outcomes),
        "num_finished": sum(outcome.is_finished for outcome in outcomes),
        "num_short": sum(outcome.is_short for outcome in outcomes),
        "errors": dict(sorted(errors.items())),
        "num_segments": len({outcome.segment for outcome in outcomes}),
        "wall_s": wall,
        "requests_per_s": throughput(outcomes),
        "output_tokens_per_s": tokens / wall,
        "total_tokens_per_s": (tokens + prompts) / wall,
        "first_token_s": quantiles(_known(outcomes, "first_token_after_s")),
        "per_token_s": quantiles(_known(outcomes, "per_token_s")),
        "longest_gap_s": quantiles([o.gaps_s["max"] for o in outcomes if o.gaps_s is not None]),
        "sent_late_s": quantiles([at - due for at, due in sent if at is not None]),
        "slo": {
            f"{slo_s:g}s": {
                "attainment": attainment(outcomes, slo_s),
                "satisfaction": satisfaction(outcomes, slo_s),
                "goodput": goodput(outcomes, slo_s, per_token_slo_s),
            }
            for slo_s in slos_s
        },
    }


def _known(outcomes: Sequence[Outcome], name: str) -> list[float]:
    values = (getattr(outcome, name) for outcome in outcomes)
    return [value for value in values if value is not None]


def table(summary: dict[str, Any]) -> str:
    """A summary for people to read."""
    errors = ", ".join(f"{count} {kind}" for kind, count in summary["errors"].items()) or "none"
    lines = [
        f"requests       {summary['num_finished']} of {summary['num_requests']} finished; "
        f"failed: {errors}",
        f"throughput     {summary['requests_per_s']:.2f} requests/s, "
        f"{summary['output_tokens_per_s']:.0f} output tokens/s, "
        f"{summary['total_tokens_per_s']:.0f} tokens/s in all, over {summary['wall_s']:.1f} s",
    ]
    for name, title in (
        ("first_token_s", "first token"), ("per_token_s", "per token"),
        ("longest_gap_s", "longest gap"), ("sent_late_s", "sent late by"),
    ):  # fmt: skip
        if summary[name] is not None:
            values = "  ".join(f"{q} {1e3 * s:.1f}" for q, s in summary[name].items())
            lines.append(f"{title:14} {values}  ms")
    for slo, met in summary["slo"].items():
        lines.append(
            f"{'SLO ' + slo:14} attainment {met['attainment']:.3f}  "
            f"satisfaction {met['satisfaction']:.3f}  goodput {met['goodput']:.2f} requests/s"
        )
    if summary["num_short"]:
        lines.append(f"WARNING        {summary['num_short']} answers of another length than asked")
    if summary["num_segments"] > 1:
        lines.append("WARNING        a resumed run: the queue was empty at the start of each part")
    return "\n".join(lines)


def main() -> None:
    args = _parse()
    try:
        _, records = read_records(args.records)
        outcomes = [Outcome.from_record(record) for record in records]
        if not outcomes:
            raise RecordError(f"{args.records}: got no record, allowed: at least one")
    except (OSError, RecordError) as exc:
        raise SystemExit(f"bench.slo: {exc}") from exc
    print(table(summarise(outcomes, slos_s=args.slo, per_token_slo_s=args.per_token_slo)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("--slo", type=float, nargs="+", default=[SLO_S, 1.0], help="seconds")
    parser.add_argument("--per-token-slo", type=float, help="seconds, for goodput")
    return parser.parse_args()


if __name__ == "__main__":
    main()
