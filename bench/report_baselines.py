"""The report's sections about what the paper replaced: split pools, padding, bmm, merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import paper
from bench.report_plots import Panel
from bench.report_rows import Row, missing, pick
from bench.report_sections import NOTHING, Section, Table, percent


def ablation(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> Section:
    found = pick(rows, "ablation")
    ours: dict[str, dict[str, float]] = {}
    for row in found:
        group = f"{row.setting}, n = {row.num_adapters}\n{row.pool}"
        if row.retention is not None:
            ours.setdefault(group, {})[row.system] = row.retention
    papers = {
        f"{setting}, n = {count}\n{gpu}": {
            name: value / values.get("base", rate)
            for name, value in values.items()
            if name != "base"
        }
        for (gpu, setting, count, rate), values in paper.ABLATION.items()
    }
    return Section(
        figure="ablation",
        title="Unified paging, exact ranks and kernels: one replaced at a time",
        text=(
            "On pools as the paper's GPUs had. no-unify-mem: half (or a quarter) of the pool for "
            "adapters alone, the rest for KV cache alone. padded ranks: every adapter stored and "
            "computed at rank 64. bmm: adapters gathered, padded and multiplied in one batch. "
            "The paper's bars are over its base, or over the offered rate where it gave no base."
        ),
        panels=[
            Panel(
                title="Here: of the base on the same pool", x_label="", y_label="share of base",
                bars=ours,
            ),
            Panel(
                title="The paper", x_label="", y_label="share of base (or of offered)", bars=papers
            ),
        ],
        tables=[
            Table(
                header=("setting", "adapters", "pool", "system", "requests/s", "of base",
                        "ceiling", "installs", "evictions", "preemptions"),
                rows=[
                    [
                        row.setting, str(row.num_adapters), row.pool, row.system,
                        f"{row.requests_per_s:.2f}", percent(row.retention),
                        percent(row.ceiling),
                        *(str(row.record["counters"].get(name, NOTHING)) for name in
                          ("adapter_installs", "adapter_evictions", "preemptions")),
                    ]
                    for row in found
                ],
            )
        ],
        missing=missing(records, "ablation"),
    )  # fmt: skip


def merged(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> Section:
    found = pick(rows, "merged")
    names = {"sloraj": "on the fly"}
    ours = {names.get(row.system, row.system): row.requests_per_s for row in found}
    return Section(
        figure="merged",
        title="A single adapter: merged into the weights, or computed on the fly",
        text=(
            "Merged weights cost nothing and serve one adapter alone. The paper (A10G): "
            f"{paper.MERGED['merged']} merged, {paper.MERGED['on the fly']} on the fly, in "
            f"requests/s: {percent(paper.MERGED['on the fly'] / paper.MERGED['merged'])}."
        ),
        panels=[
            Panel(
                title="A single adapter", x_label="", y_label="of merged throughput",
                bars={
                    where: {name: value / values["merged"] for name, value in values.items()}
                    for where, values in (("here, full pool", ours), ("paper, A10G", paper.MERGED))
                    if "merged" in values
                },
            )
        ],
        tables=[
            Table(
                header=("system", "requests/s", "of base"),
                rows=[
                    [row.system, f"{row.requests_per_s:.2f}", percent(row.retention)]
                    for row in found
                ],
            )
        ],
        missing=missing(records, "merged"),
    )  # fmt: skip
