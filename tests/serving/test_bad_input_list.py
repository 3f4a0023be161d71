"""The list of bad inputs and the tests that are marked with its rows agree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def listed() -> dict[int, set[str]]:
    """Row number -> the files of this folder that it names."""
    rows = {}
    for line in (ROOT / "docs" / "bad_input.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].isdigit():
            rows[int(cells[0])] = set(re.findall(r"tests/serving/(test_\w+\.py)", cells[3]))
    return rows


def marked() -> dict[int, set[str]]:
    rows: dict[int, set[str]] = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        for number in re.findall(r"pytest\.mark\.row\((\d+)\)", path.read_text()):
            rows.setdefault(int(number), set()).add(path.name)
    return rows


def test_every_row_is_listed_once_in_order() -> None:
    assert list(listed()) == list(range(1, 53))


def test_the_list_and_the_marks_name_the_same_files() -> None:
    assert {row: files for row, files in listed().items() if files} == marked()
