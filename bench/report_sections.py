"""The report's sections about throughput: the paper's table and figures, and ours beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bench import paper
from bench.report_plots import Line, Panel
from bench.report_rows import Row, missing, pick
from bench.settings import SETTINGS

NOTHING = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """What the report says of one figure."""

    figure: str  # of the points; names the picture
    title: str
    text: str  # what the paper showed, what is shown here, what differs
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()
    missing: Sequence[str] = ()  # points of the grid without a measurement

    @property
    def is_empty(self) -> bool:
        return not any(table.rows for table in self.tables)


def number(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def table_3(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> Section:
    lines = []
    for setting, systems in paper.TABLE_3.items():
        by_system = {
            system: {
                r.num_adapters: r for r in pick(rows, "table-3", setting=setting, system=system)
            }
            for system in ("sloraj", "packed", "PEFT")
        }
        refused = {
            r.num_adapters: r
            for r in rows
            if r.figure == "table-3" and r.setting == setting and not r.is_measured
        }
        ours = by_system["sloraj"]
        known: list[Mapping[int, Any]] = [*by_system.values(), *systems.values()]
        for count in sorted({n for counts in known for n in counts}):
            row = ours.get(count)
            lines.append(
                [
                    setting, str(count),
                    *(_or_oom(values, count) for values in systems.values()),
                    NOTHING if row is None else f"{row.requests_per_s:.2f}",
                    NOTHING if row is None else percent(row.retention),
                    NOTHING if row is None else percent(row.ceiling),
                    NOTHING if row is None else number(row.first_token_s.get("mean")),
                    _per_s(by_system["packed"].get(count))
                    or ("out of memory" if count in refused else NOTHING),
                    _per_s(by_system["PEFT"].get(count)),
                ]
            )  # fmt: skip
    return Section(
        figure="table-3",
        title="Table 3: throughput by number of adapters",
        text=(
            "The paper: one A100 of 80 GB, 10 requests/s offered for 120 s. Here: the same lengths "
            "and adapters on a pool as that GPU had, all requests at once, which is saturation "
            "(10 requests/s would not be); time to drain is counted. Packed: one merged model an "
            "adapter, on one device in turns. PEFT: batches of one adapter."
        ),
        tables=[
            Table(
                header=(
                    "setting", "adapters", "paper: S-LoRA, requests/s", "paper: vLLM-packed",
                    "paper: PEFT", "here, requests/s", "of base", "ceiling",
                    "mean first token, s", "here: packed", "here: PEFT",
                ),
                rows=lines,
            )
        ],
        missing=missing(records, "table-3"),
    )  # fmt: skip


def _per_s(row: Row | None) -> str:
    return NOTHING if row is None else number(row.requests_per_s)


def _or_oom(values: dict[int, float | None], count: int) -> str:
    if count not in values:
        return NOTHING
    value = values[count]
    return "out of memory" if value is None else number(value)


def num_adapters(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> Section:
    found = pick(rows, "num-adapters")
    kinds = sorted({(row.engine["geometry"], row.setting) for row in found})
    throughput, shares = [], []
    for colour, (geometry, setting) in enumerate(kinds):
        mine = [r for r in found if (r.engine["geometry"], r.setting) == (geometry, setting)]
        name = f"{geometry} {setting}"
        throughput.append(
            Line(name=name, colour=colour, points={r.num_adapters: r.requests_per_s for r in mine})
        )
        for what, suffix in (("retention", ""), ("ceiling", ": ceiling")):
            points = {
                r.num_adapters: 100 * getattr(r, what) for r in mine if getattr(r, what) is not None
            }
            shares.append(
                Line(
                    name=name + suffix, colour=colour, points=points,
                    style="limit" if suffix else "ours",
                )
            )  # fmt: skip
    papers = [
        Line(
            name=f"paper, A10G, {setting}", colour=4 + i, style="paper",
            points={n: 100 * share for n, share in values.items()},
        )
        for i, (setting, values) in enumerate(paper.RETENTION.items())
    ]  # fmt: skip
    x = "adapters registered"
    return Section(
        figure="num-adapters",
        title="Throughput by number of adapters, and what the base keeps",
        text=(
            "Saturated, full pool. Retention is requests/s over those of the base alone on the "
            "same engine, drain in both; the ceiling is the same ratio by bytes and operations of "
            "the adapters that were in each step. The paper's retention is that of a saturated "
            "A10G."
        ),
        panels=[
            Panel(
                title="Throughput, full pool", x_label=x, y_label="requests/s", lines=throughput,
                is_log_x=True,
            ),
            Panel(
                title="Of the base's throughput", x_label=x, y_label="% of the base",
                lines=shares + papers, is_log_x=True, y_max=105,
            ),
        ],
        tables=[
            Table(
                header=(
                    "model", "setting", "adapters", "requests/s", "of base", "ceiling",
                    "of ceiling", "in a decode step", "installs", "wall, s",
                ),
                rows=[_retention_row(row) for row in found],
            )
        ],
        missing=missing(records, "num-adapters"),
    )  # fmt: skip


def ranks(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> Section:
    found = sorted(pick(rows, "ranks"), key=lambda row: rank_of(row))
    lines = [
        Line(
            name=name, style=style,
            points={
                rank_of(r): 100 * getattr(r, what)
                for r in found
                if getattr(r, what) is not None
            },
        )
        for name, what, style in (("here", "retention", "ours"), ("ceiling", "ceiling", "limit"))
    ]  # fmt: skip
    return Section(
        figure="ranks",
        title="Throughput by rank",
        text="Llama-7B, 200 adapters of one rank on q, k, v and o, full pool, saturated.",
        panels=[
            Panel(
                title="200 adapters of one rank", x_label="rank", y_label="% of the base",
                lines=lines, is_log_x=True, y_max=105,
            )
        ],
        tables=[
            Table(
                header=("rank", "requests/s", "of base", "ceiling", "in a decode step"),
                rows=[
                    [str(rank_of(row)), number(row.requests_per_s), percent(row.retention),
                     percent(row.ceiling), number(row.record["steps"]["decode_adapters"], 1)]
                    for row in found
                ],
            )
        ],
        missing=missing(records, "ranks"),
    )  # fmt: skip


def rank_of(row: Row) -> int:
    """Of the adapters, where all have one."""
    (rank,) = SETTINGS[row.setting].ranks
    return rank


def _retention_row(row: Row) -> list[str]:
    kept, ceiling = row.retention, row.ceiling
    return [
        row.engine["geometry"], row.setting, str(row.num_adapters),
        f"{row.requests_per_s:.2f}", percent(kept), percent(ceiling),
        percent(kept / ceiling if kept and ceiling else None),
        number(row.record["steps"]["decode_adapters"], 1),
        str(row.record["counters"]["adapter_installs"]),
        number(row.record["summary"]["wall_s"], 1),
    ]  # fmt: skip
