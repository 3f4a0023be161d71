"""Raw results: a JSONL file whose first line says what was measured and how, then one line each.

    with RecordFile.create(path, header(bench="serving", device="NVIDIA H200", settings={...},
                                        seed=42)) as file:
        file.append({"request": 0, ...})

    with RecordFile.resume(path, the_same_header) as file:   # after a crash or Ctrl-C
        done = {record["request"] for record in file.records}

    head, records = read_records(path)
    write_table(path.with_suffix(".csv"), records)

Every append is one write that ends in a newline, so that a crash can tear only the last line;
resuming cuts that line off, reading passes over it. A resumed file must have been started with
the same settings, seed, device and commit.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from bench.record import command, commit

MUST_MATCH = ("bench", "device", "commit", "seed", "settings")


class RecordError(ValueError):
    """A record file that cannot be read, or that another run has written."""


def header(
    *, bench: str, device: str, settings: dict[str, Any], seed: int, commit_name: str | None = None
) -> dict[str, Any]:
    """The first line of a file. Commit and command are those of this process, unless the tree is
    no repository and `commit_name` says it.
    """
    return {
        "bench": bench,
        "device": device,
        "commit": commit_name or commit(),
        "seed": seed,
        "settings": settings,
        "command": command(),
    }


class RecordFile:
    """An open file that records are appended to; `records` are those that it held already."""

    def __init__(self, path: Path, file: BinaryIO, records: list[dict[str, Any]]) -> None:
        self.path = path
        self.records = records
        self._file = file

    @classmethod
    def create(cls, path: Path, head: dict[str, Any]) -> Self:
        """Start a file. Raises RecordError if there is one: results are not overwritten."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("xb", buffering=0)
        except FileExistsError as exc:
            raise RecordError(f"{path}: exists; resume it, or choose another name") from exc
        made = cls(path, file, [])
        made._write({"header": head})
        return made

    @classmethod
    def resume(cls, path: Path, head: dict[str, Any]) -> Self:
        """Go on with a file of the same run, or start it if there is none.

        Raises: RecordError: it is of another run (says what differs), or is damaged.
        """
        if not path.exists() or not _whole_lines(path.read_bytes()):
            path.unlink(missing_ok=True)  # nothing, or a header torn in the middle
            return cls.create(path, head)
        found, records = read_records(path)
        given = json.loads(json.dumps(head))  # tuples become lists, as they did in the file
        for key in MUST_MATCH:
            if found.get(key) != given.get(key):
                raise RecordError(
                    f"{path}: {key} is {found.get(key)!r}, this run's is {given.get(key)!r}; "
                    "choose another name"
                )
        file = path.open("r+b", buffering=0)
        file.truncate(len(_whole_lines(path.read_bytes())))
        file.seek(0, 2)
        return cls(path, file, records)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is in the file when this returns. NaN is refused (ValueError)."""
        self._write(record)

    def _write(self, line: dict[str, Any]) -> None:
        rest = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
        while rest:  # an unbuffered write may take less than all
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_records(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the records of a file; a torn last line is passed over.

    Raises: RecordError: a line that is no JSON object, or no header.
    """
    rows = []
    lines = _whole_lines(path.read_bytes()).split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise RecordError(f"{path}, line {number}: {exc}, allowed: a JSON object") from exc
        if not isinstance(row, dict):
            raise RecordError(f"{path}, line {number}: got {row!r}, allowed: a JSON object")
        rows.append(row)
    if not rows or not isinstance(rows[0].get("header"), dict):
        raise RecordError(f'{path}, line 1: no header, allowed: {{"header": ...}}')
    return rows[0]["header"], rows[1:]


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as CSV, one value a cell: {"a": {"b": 1}} is in column "a.b", None is an empty cell, and
    lists are left out (they stay in the raw file). Columns are in order of first appearance.
    """
    flat = [dict(_cells("", row)) for row in rows]
    columns = dict.fromkeys(name for row in flat for name in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def _cells(prefix: str, row: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _cells(f"{prefix}{name}.", value)
        elif not isinstance(value, list | tuple):
            yield f"{prefix}{name}", value
