"""One line for every numbered target: what was wanted, what was measured, whether it was met.

    python -m bench.summary bench/results/nvidia-h200

Every benchmark puts the targets that it measures into its own result, under "targets" (see
`target`). This collects them from all results of a directory into its summary.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "summary.json"


def target(
    number: str,
    name: str,
    *,
    measured: float,
    limit: float,
    unit: str,
    floor: float | None = None,
    is_minimum: bool = False,
) -> dict[str, Any]:
    """An entry for a result's "targets".

    number: of the target in the plan ("1", "6"; "C1" of its part C). limit: what is wanted, at
    most, or at least if `is_minimum`. floor: what cannot be beaten, in the same unit, where that
    is known.
    """
    met = measured >= limit if is_minimum else measured <= limit
    wanted = "at least" if is_minimum else "at most"
    return {
        "number": number,
        "name": name,
        "measured": measured,
        "unit": unit,
        "floor": floor,
        "target": f"{wanted} {limit:.4g}",
        "met": met,
    }


def worst_target(
    number: str, what: str, judged: Sequence[dict[str, Any]], key: str, *, plural: str
) -> dict[str, Any]:
    """One entry for measurements of one kind: the one furthest from its limit, and how many hold.

    judged: with "us", "limit_us", "floor_us", and the name of each under `key`.
    """
    worst = max(judged, key=lambda one: one["us"] / one["limit_us"])
    num_met = sum(one["us"] <= one["limit_us"] for one in judged)
    return target(
        number,
        f"{what}: {num_met} of {len(judged)} {plural} in their limits, worst {worst[key]}",
        measured=worst["us"],
        limit=worst["limit_us"],
        unit="us",
        floor=worst["floor_us"],
    )


def collect(directory: Path) -> list[dict[str, Any]]:
    """The targets of all results, in order, each with its file, command, device and commit."""
    entries = []
    for path in sorted(directory.glob("*.json")):
        result = {} if path.name == NAME else json.loads(path.read_text())
        for entry in result.get("targets", ()):
            origin = {key: result[key] for key in ("command", "device", "commit")}
            entries.append(entry | origin | {"raw": path.name})
    return sorted(entries, key=lambda entry: (_place(entry["number"]), entry["name"]))


def _place(number: str) -> tuple[str, int]:
    """Part, then number: "9", "10", "C1"."""
    part = number.rstrip("0123456789")
    return part, int(number.removeprefix(part))


def table(entries: list[dict[str, Any]]) -> str:
    """The entries for people to read, as Markdown."""
    lines = [
        "| target | what | measured | floor | wanted | met |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        floor = "" if entry["floor"] is None else f"{entry['floor']:.4g}"
        lines.append(
            f"| {entry['number']} | {entry['name']} | {entry['measured']:.4g} {entry['unit']} | "
            f"{floor} | {entry['target']} | {'yes' if entry['met'] else '**no**'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    entries = collect(directory)
    (directory / NAME).write_text(json.dumps(entries, indent=1) + "\n")
    print(table(entries))


if __name__ == "__main__":
    main()
