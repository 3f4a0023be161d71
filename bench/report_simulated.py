"""The report's sections about what one machine cannot hold, from `bench.simulator.beyond`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import paper
from bench.report_plots import Line, Panel
from bench.report_sections import Section, Table, number, percent
from bench.settings import SETTINGS

NAME = "simulated-beyond.json"
COMMAND = f"python -m bench.simulator.beyond --model simulator-model.json --out {NAME}"
PAPERS_GPUS = 4  # in its figure; other numbers are in the table
Points = Sequence[dict[str, Any]]


def read_simulated(path: Path) -> list[dict[str, Any]]:
    """The simulated points of a result; none if there is no such file."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text())["points"]
    return found


def many_adapters(points: Points) -> Section:
    """S2 on one GPU, up to more adapters than the host's memory holds."""
    mine = [point for point in points if point["gpus"] == 1]
    return Section(
        figure="simulated-adapters",
        title="SIMULATED: S2 with more adapters than the host holds",
        text=(
            "The real scheduler and pool on a simulated clock, with a device model fitted on runs "
            "of this GPU; full pool, saturated. Not a measurement."
        ),
        panels=[
            Panel(
                title="S2, full pool (simulated)", x_label="adapters registered",
                y_label="% of the base", is_log_x=True, y_max=105,
                lines=[
                    Line(
                        name="simulated",
                        points={
                            p["adapters"]: 100 * share
                            for p in mine
                            if p["adapters"] and (share := _of_base(p, points)) is not None
                        },
                    )
                ],
            )
        ],
        tables=[_table(mine, points)],
        missing=[] if mine else [COMMAND],
    )  # fmt: skip


def tensor_parallel(points: Points) -> Section:
    """The paper's tensor-parallel figure."""
    mine = [point for point in points if point["gpus"] > 1]
    bars: dict[str, dict[str, float]] = {}
    for point in mine:
        if point["gpus"] != PAPERS_GPUS:
            continue
        group = f"{point['setting']}, {base_size(point['setting'])}\nn = {point['adapters']}"
        bars.setdefault(group, {})[point["kind"]] = point["requests_per_s"]
    return Section(
        figure="tensor-parallel",
        title="SIMULATED: tensor parallelism",
        text=(
            "Ours is simulated: the fitted model scaled to larger bases and several GPUs, with the "
            "collectives' latency and bytes of an NVLink ring. Not a measurement. The paper's "
            "figure (measured on A100s) is read off its plot."
        ),
        panels=[
            Panel(
                title=f"Simulated, {PAPERS_GPUS} H200s", x_label="", y_label="requests/s", bars=bars
            ),
            Panel(
                title="The paper", x_label="", y_label="requests/s",
                bars={
                    name: dict(
                        zip(
                            ("base", "without LoRA's communication", "S-LoRA"), reversed(values),
                            strict=True,
                        )
                    )
                    for name, values in paper.TENSOR_PARALLEL.items()
                },
            ),
        ],
        tables=[_table(mine, points)],
        missing=[] if mine else [COMMAND],
    )  # fmt: skip


def base_size(setting: str) -> str:
    """ "30B": of a setting's base."""
    return SETTINGS[setting].geometry.rpartition("-")[2].upper()


def _table(mine: Points, points: Points) -> Table:
    return Table(
        header=("setting", "GPUs", "adapters", "what", "requests/s (simulated)", "of base"),
        rows=[
            [
                point["setting"], str(point["gpus"]), str(point["adapters"]), point["kind"],
                number(point["requests_per_s"]), percent(_of_base(point, points)),
            ]
            for point in mine
        ],
    )  # fmt: skip


def _of_base(point: dict[str, Any], points: Points) -> float | None:
    for base in points:
        same = all(base[name] == point[name] for name in ("setting", "gpus"))
        if same and base["kind"] == "base":
            return float(point["requests_per_s"] / base["requests_per_s"])
    return None
