"""The report's sections about latency and the first-token objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench import paper
from bench.columns import from_columns
from bench.report_plots import Line, Panel
from bench.report_rows import Row, missing, pick, place_of
from bench.report_sections import Section, Table, number

Records = Sequence[dict[str, Any]]


def by_axis(
    figure: str, axis: str, title: str, x_label: str, text: str, *, is_log_x: bool = False
) -> Callable[[Sequence[Row], Records], Section]:
    """A section of one axis of the workload: throughput, first token and attainment over it."""

    def make(rows: Sequence[Row], records: Records) -> Section:
        found = sorted(pick(rows, figure), key=lambda row: (place_of(row), float(row.point[axis])))
        systems = list(dict.fromkeys(row.system for row in found))

        def lines(value: Callable[[Row], float | None], suffix: str = "") -> list[Line]:
            made = []
            for colour, system in enumerate(systems):
                mine = [row for row in found if row.system == system]
                values = {float(row.point[axis]): value(row) for row in mine}
                points = {x: y for x, y in values.items() if y is not None}
                made.append(
                    Line(
                        name=system + suffix, points=points, colour=colour,
                        style="second" if suffix.endswith("1 s") else "ours",
                    )
                )  # fmt: skip
            return made

        return Section(
            figure=figure,
            title=title,
            text=text,
            panels=[
                Panel(
                    title="Throughput", x_label=x_label, y_label="requests/s",
                    lines=lines(lambda row: row.requests_per_s), is_log_x=is_log_x,
                ),
                Panel(
                    title="First token, mean", x_label=x_label, y_label="seconds",
                    lines=lines(lambda row: row.first_token_s.get("mean")), is_log_x=is_log_x,
                ),
                Panel(
                    title="First tokens in time", x_label=x_label, y_label="share of requests",
                    lines=lines(lambda row: row.slo("6s"), ", 6 s")
                    + lines(lambda row: row.slo("1s"), ", 1 s"),
                    y_max=1.05, is_log_x=is_log_x,
                ),
            ],
            tables=[
                Table(
                    header=(
                        "system", x_label, "adapters", "pool", "offered, requests/s",
                        "requests/s", "first token, s: mean", "p99", "within 6 s", "within 1 s",
                        "satisfaction, 6 s",
                    ),
                    rows=[
                        [
                            row.system, f"{row.point[axis]:g}", str(row.num_adapters), row.pool,
                            number(row.record["offered_rate"]), number(row.requests_per_s),
                            number(row.first_token_s.get("mean")),
                            number(row.first_token_s.get("p99")), number(row.slo("6s")),
                            number(row.slo("1s")), number(row.slo("6s", "satisfaction")),
                        ]
                        for row in found
                    ],
                )
            ],
            missing=missing(records, figure),
        )  # fmt: skip

    return make


rate = by_axis(
    "rate", "load", "Throughput, latency and objective by rate",
    "load, of the base's saturated rate",
    "S2, 200 adapters, a pool as on 24 GB. The paper's rates are requests/s on its GPUs; here they "
    "are parts of what the base alone can do at saturation on the same pool.",
)  # fmt: skip
alpha = by_axis(
    "alpha", "alpha", "Skew of popularity", "alpha (1: uniform)",
    "S2, 200 adapters, a pool as on 24 GB, 0.8 of the base's saturated rate. The smaller alpha, "
    "the fewer adapters take most requests. The paper: the same trend, on an A10G.",
)  # fmt: skip
cv = by_axis(
    "cv", "cv", "Burstiness of arrivals", "coefficient of variation of the gaps",
    "S2, 200 adapters, a pool as on 24 GB, 0.8 of the base's saturated rate.",
)  # fmt: skip


def abort(rows: Sequence[Row], records: Records) -> Section:
    made = by_axis(
        "abort", "load", "Early abort: who is served when not all can be",
        "load, of the base's saturated rate",
        "S2, 200 adapters, a pool as on 24 GB, all policies at the same load. The paper's shares "
        "of first tokens within 6 s are in the bars.",
    )(rows, records)  # fmt: skip
    bars = {
        f"{gpu}\n{setting}, cv = {cv:g}": values
        for (gpu, setting, _, _, cv), values in paper.ATTAINMENT.items()
    }
    papers = Panel(
        title="The paper: within 6 s", x_label="", y_label="share of requests", bars=bars, y_max=1.0
    )
    return Section(
        figure=made.figure, title=made.title, text=made.text, panels=[*made.panels, papers],
        tables=made.tables, missing=made.missing,
    )  # fmt: skip


def policies(rows: Sequence[Row], records: Records) -> Section:
    return _policies(
        "policies", rows, records, lambda row: {n: row.first_token_s[n] for n in ("mean", "p99")},
        "Prefetch and retention: one taken away or replaced at a time",
        "S2, 200 adapters, alpha 0.6, a pool as on 24 GB, 0.7 of the base's saturated rate: "
        "adapters come and go, and the queue is short enough for a load to be seen. The "
        "paper's retention keeps nothing that neither runs nor is prefetched.",
    )  # fmt: skip


def policies_short(rows: Sequence[Row], records: Records) -> Section:
    return _policies(
        "policies-short", rows, records,
        lambda row: {f"mean, {row.num_adapters} adapters": row.first_token_s["mean"]},
        "Prefetch and retention where requests are short",
        "S2, prompts of 8 to 127 and answers of 8 to 31 tokens, a pool as on 24 GB, 0.6 of the "
        "base's saturated rate: a request is served in a fifth of a second, so that sending its "
        "adapter is much of the work. 100 adapters of uniform popularity, and 200 with alpha 0.6.",
    )  # fmt: skip


def _policies(
    figure: str,
    rows: Sequence[Row],
    records: Records,
    drawn: Callable[[Row], dict[str, float]],
    title: str,
    text: str,
) -> Section:
    """`drawn`: the bars of a row's system, by their group."""
    found = pick(rows, figure)
    bars: dict[str, dict[str, float]] = {}
    for row in (row for row in found if row.first_token_s):
        for group, seconds in drawn(row).items():
            bars.setdefault(group, {})[row.system] = seconds
    return Section(
        figure=figure,
        title=title,
        text=text,
        panels=[Panel(title="First token", x_label="", y_label="seconds", bars=bars)],
        tables=[
            Table(
                header=("policies", "adapters", "requests/s", "first token, s: mean", "p99",
                        "within 1 s", "installs", "evictions", "preemptions"),
                rows=[
                    [row.system, str(row.num_adapters), number(row.requests_per_s),
                     number(row.first_token_s.get("mean"), 3),
                     number(row.first_token_s.get("p99"), 3), number(row.slo("1s"), 3),
                     *(str(row.record["counters"].get(name, "")) for name in
                       ("adapter_installs", "adapter_evictions", "preemptions"))]
                    for row in found
                ],
            )
        ],
        missing=missing(records, figure),
    )  # fmt: skip


def clusters(rows: Sequence[Row], records: Records) -> Section:
    found = pick(rows, "clusters")
    panels = []
    shown: list[tuple[str, str, Callable[[Row], float], int]] = [
        ("Throughput", "of that at d = 32", lambda row: row.requests_per_s, 0),
        ("Within 6 s", "share of requests", lambda row: row.slo("6s"), 1),
    ]
    for name, y_label, value, place in shown:
        lines = []
        for colour, a in enumerate(sorted({row.alpha for row in found})):
            points = {_d(row): value(row) for row in found if row.alpha == a}
            lines.append(Line(name=f"S2, alpha = {a:g}", points=points, colour=colour))
        for colour, (setting, values) in enumerate(paper.CLUSTERS.items(), start=4):
            points = {d: pair[place] for d, pair in values.items()}
            lines.append(Line(name=f"paper {setting}", points=points, colour=colour, style="paper"))
        if place == 0:
            lines = [_over_last(line) for line in lines]
        panels.append(
            Panel(
                title=name, x_label="d: adapters in a batch", y_label=y_label, lines=lines,
                is_log_x=True,
            )
        )  # fmt: skip
    return Section(
        figure="clusters",
        title="Adapter clustering",
        text=(
            "S2, 32 adapters, a pool as on 40 GB, 0.9 of the base's saturated rate (the paper: an "
            "A100 of 40 GB, 2 requests/s)."
        ),
        panels=panels,
        tables=[
            Table(
                header=("d", "alpha", "requests/s", "in a decode step", "within 6 s",
                        "first token, s: mean", "p99"),
                rows=[
                    [f"{_d(row):g}", f"{row.alpha:g}", number(row.requests_per_s),
                     number(row.record["steps"]["decode_adapters"], 1), number(row.slo("6s")),
                     number(row.first_token_s.get("mean")), number(row.first_token_s.get("p99"))]
                    for row in found
                ],
            )
        ],
        missing=missing(records, "clusters"),
    )  # fmt: skip


def _d(row: Row) -> float:
    return float(row.system.rpartition(" ")[2])


def _over_last(line: Line) -> Line:
    """Of its value at the largest x."""
    if not line.points:
        return line
    last = line.points[max(line.points)]
    points = {x: y / last for x, y in line.points.items()}
    return Line(name=line.name, points=points, colour=line.colour, style=line.style)


def fairness(rows: Sequence[Row], records: Records) -> Section:
    found = sorted(pick(rows, "fairness"), key=lambda row: (place_of(row), row.flood or 0))
    return Section(
        figure="fairness",
        title="One tenant floods the others",
        text=(
            "20 tenants, an adapter each, 0.6 of the base's saturated rate; then the same and "
            "besides it one tenant at 20 times a tenant's rate. Shown is what the others get."
        ),
        tables=[
            Table(
                header=("order", "flood", "requests/s", "others: first token, s: p50", "p99",
                        "the flooding tenant: p50"),
                rows=[
                    [row.system, "no" if row.flood is None else f"{row.flood:g}x",
                     number(row.requests_per_s),
                     number(others_first_s(row, 50), 3), number(others_first_s(row, 99), 3),
                     number(first_s(row, 50, lambda tenant: tenant == FLOODER), 3)]
                    for row in found
                ],
            )
        ],
        missing=missing(records, "fairness"),
    )  # fmt: skip


FLOODER = "adapter-0"


def others_first_s(row: Row, q: float) -> float | None:
    """A percentile of the first-token times of all tenants but the one that floods."""
    return first_s(row, q, lambda tenant: tenant != FLOODER)


def first_s(row: Row, q: float, is_wanted: Callable[[str], bool]) -> float | None:
    outcomes = from_columns(row.record["requests"])
    found = [
        o.first_token_after_s
        for o in outcomes
        if is_wanted(o.tenant) and o.first_token_after_s is not None
    ]
    return float(np.percentile(found, q)) if found else None
