"""What the sweeps were to show, judged: entries for `bench.summary`, of what has been measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.report_rows import Row, pick
from bench.report_slo import others_first_s
from bench.summary import target

OF_CEILING = 0.92
PAPERS = {"S1": 0.90, "S2": 0.76}  # of the base, at 200 adapters, on a saturated A10G
POINTS_APART = 0.10  # 10,000 adapters from 200
OVER_SPLIT = 1.3
SPLIT = "no-unify-mem"
FLOODED = 2.0
OURS = {"6s": "sloraj", "1s": "sloraj, for 1 s"}  # by the objective that it is set to
OTHERS = ("first come", "newest first", "the paper's", "the paper's, for 1 s")


def targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry for each figure that the rows measure."""
    measured = [row for row in rows if row.is_measured]
    return [
        *_retention(measured),
        *_many(measured),
        *_split(measured),
        *_attainment(measured),
        *_flood(measured),
    ]


def _retention(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    for row in pick(rows, "num-adapters", system="sloraj"):
        kept, ceiling = row.retention, row.ceiling
        is_7b = row.engine["geometry"] == "llama-7b"
        if kept is None or ceiling is None or not is_7b or row.num_adapters < 200:
            continue
        name = f"{row.setting}, {row.num_adapters} adapters, full pool"
        yield target(
            "C1", f"{name}: retention, of its ceiling", measured=kept / ceiling, limit=OF_CEILING,
            unit="", is_minimum=True,
        )  # fmt: skip
        if row.num_adapters == 200 and row.setting in PAPERS:
            yield target(
                "C1", f"{name}: retention", measured=kept, limit=PAPERS[row.setting], unit="",
                floor=ceiling, is_minimum=True,
            )  # fmt: skip


def _many(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    kept = {
        row.num_adapters: row.retention
        for row in pick(rows, "num-adapters", system="sloraj")
        if row.engine["geometry"] == "llama-3.1-8b" and row.retention is not None
    }
    few, many = kept.get(200), kept.get(10_000)
    if few is not None and many is not None:
        yield target(
            "C1", "10,000 adapters of rank 8 on q and v, 8B: retention below that of 200",
            measured=few - many, limit=POINTS_APART, unit="",
        )  # fmt: skip


def _split(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    """Against the halves of the paper's variant, and against the best split that was tried."""
    for gb in (24.0, 40.0):
        found = pick(rows, "ablation", setting="S2", num_adapters=200, pool_gb=gb)
        ours = [row.requests_per_s for row in found if row.system == "sloraj"]
        split = {row.system: row.requests_per_s for row in found if row.system.startswith(SPLIT)}
        if not ours or not split:
            continue
        best = max(split, key=lambda system: split[system])
        over = {best: f"over {best}, the best split that was measured"}
        over |= {SPLIT: f"over {SPLIT}, halves as the paper's"} if SPLIT in split else {}
        for system, name in over.items():
            yield target(
                "C1", f"S2, 200 adapters, {gb:g} GB: {name}", measured=ours[0] / split[system],
                limit=OVER_SPLIT, unit="x", is_minimum=True,
            )  # fmt: skip


def _attainment(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    """Ours at every load and objective against the best of the others at the same ones."""
    found = pick(rows, "abort")
    for slo, ours in OURS.items():
        for load in sorted({row.load for row in found}):
            at_load = {row.system: row.slo(slo) for row in found if row.load == load}
            others = {name: value for name, value in at_load.items() if name in OTHERS}
            if ours in at_load and others:
                best = max(others, key=lambda name: others[name])
                yield target(
                    "C2", f"first tokens within {slo.removesuffix('s')} s at load {load:g}, {best} "
                    "the best of the others",
                    measured=at_load[ours], limit=others[best], unit="", is_minimum=True,
                )  # fmt: skip


def _flood(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    """Of the fair orders; what is without them stands beside it, in the report."""
    p99: dict[tuple[str, bool], float] = {}
    for row in pick(rows, "fairness"):
        value = others_first_s(row, 99)
        if value is not None and row.system not in OTHERS:
            p99[row.system, row.flood is not None] = value
    for system in sorted({name for name, _ in p99}):
        calm, flooded = p99.get((system, False)), p99.get((system, True))
        if calm is not None and flooded is not None:
            yield target(
                "C3", f"{system}: p99 first token of the others, flooded over not",
                measured=flooded / calm, limit=FLOODED, unit="x",
            )  # fmt: skip
