"""Pictures of the report: lines over an axis and groups of bars, one look for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#edae49", "#6a4c93", "#00798c", "#8d6a3f", "#555555")
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"linestyle": "-", "marker": "o"},
    "paper": {"linestyle": "--", "marker": "x"},
    "limit": {"linestyle": ":", "marker": None},  # what cannot be passed
    "second": {"linestyle": "-.", "marker": "^"},  # ours, of the same colour once more
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Points of one line, by x."""

    name: str
    points: Mapping[float, float]
    style: str = "ours"  # a name of STYLES
    colour: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes: lines, or groups of bars (group -> bar -> height)."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line] = ()
    bars: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    is_log_x: bool = False
    y_max: float | None = None

    @property
    def is_empty(self) -> bool:
        return not any(line.points for line in self.lines) and not any(self.bars.values())


def draw(panels: Sequence[Panel], path: Path) -> bool:
    """Write the panels that have anything in them side by side; False if none has."""
    shown = [panel for panel in panels if not panel.is_empty]
    if not shown:
        return False
    widths = [_width(panel) for panel in shown]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(sum(widths), 4.8), squeeze=False, layout="constrained",
        width_ratios=widths,
    )  # fmt: skip
    for panel, ax in zip(shown, axes[0], strict=True):
        _draw_one(panel, ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _width(panel: Panel) -> float:
    """Inches: every bar needs room for its number."""
    num_bars = sum(map(len, panel.bars.values()))
    return max(5.2, 0.45 * num_bars + 1.5)


def _draw_one(panel: Panel, ax: Axes) -> None:
    if panel.bars:
        _draw_bars(panel.bars, ax)
    for line in panel.lines:
        if line.points:
            xs = sorted(line.points)
            ax.plot(
                xs, [line.points[x] for x in xs], label=line.name,
                color=COLOURS[line.colour % len(COLOURS)], **STYLES[line.style],
            )  # fmt: skip
    if panel.is_log_x:
        ax.set_xscale("symlog" if any(0 in line.points for line in panel.lines) else "log")
        xs = sorted({x for line in panel.lines for x in line.points})
        ax.set_xticks(xs, [f"{x:g}" for x in xs], rotation=45, fontsize=8)
        ax.minorticks_off()
    ax.set_title(panel.title, fontsize=10)
    ax.set_xlabel(panel.x_label)
    ax.set_ylabel(panel.y_label)
    ax.set_ylim(bottom=0, top=panel.y_max or 1.08 * ax.get_ylim()[1])
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(
        fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2),
        ncols=4 if panel.bars else 2,
    )  # fmt: skip


def _draw_bars(groups: Mapping[str, Mapping[str, float]], ax: Axes) -> None:
    """The bars that a group has stand side by side, with no gap for those it has not."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = min(0.3, 0.8 / max(len(bars) for bars in groups.values()))
    for i, name in enumerate(names):
        places, heights = [], []
        for group, bars in enumerate(groups.values()):
            if name in bars:
                present = [other for other in names if other in bars]
                places.append(group + (present.index(name) - (len(present) - 1) / 2) * width)
                heights.append(bars[name])
        drawn = ax.bar(places, heights, width, label=name, color=COLOURS[i % len(COLOURS)])
        ax.bar_label(drawn, fmt="%.2f", fontsize=7, padding=1)
    ax.set_xticks(range(len(groups)), list(groups), fontsize=8)
