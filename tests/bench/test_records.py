"""A record file holds what was appended, once, through crashes and resumptions."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from bench.records import RecordError, RecordFile, header, read_records, write_table

HEAD = header(bench="x", device="a GPU", settings={"rate": 2.0, "range": (8, 512)}, seed=42)
ROWS: list[dict[str, Any]] = [{"i": i, "text": "é\r\n\u2028", "deep": {"x": [i]}} for i in range(5)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with RecordFile.create(path, HEAD) as file:
        for row in rows:
            file.append(row)


def test_what_was_appended_is_read_back_under_its_header(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    write(path, ROWS)
    head, rows = read_records(path)
    assert rows == ROWS
    assert head == json.loads(json.dumps(HEAD))
    assert {"bench", "device", "commit", "seed", "settings", "command"} <= head.keys()
    assert path.read_bytes().count(b"\n") == 1 + len(ROWS)


def test_a_record_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile.create(path, HEAD) as file:
        for count, row in enumerate(ROWS, start=1):
            file.append(row)
            assert read_records(path)[1] == ROWS[:count]


def test_wherever_a_file_is_torn_it_resumes_with_every_whole_record_once(tmp_path: Path) -> None:
    head = {"bench": "x"}
    with RecordFile.create(tmp_path / "whole.jsonl", head) as file:
        for row in ROWS[:2]:
            file.append(row)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for cut in range(len(whole) + 1):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(whole[:cut])
        kept = max(0, whole[:cut].count(b"\n") - 1)
        with RecordFile.resume(path, head) as file:
            assert file.records == ROWS[:kept]
            for row in ROWS[kept:2]:
                file.append(row)
        assert path.read_bytes() == whole


def test_a_missing_file_is_started_and_a_present_one_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile.resume(path, HEAD) as file:
        file.append({"i": 0})
    with pytest.raises(RecordError, match=r"r\.jsonl: exists; resume it"):
        RecordFile.create(path, HEAD)
    assert read_records(path)[1] == [{"i": 0}]


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 43), ("device", "another"), ("settings", {"rate": 3.0}), ("commit", "abc")],
)
def test_another_runs_file_is_not_resumed(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "r.jsonl"
    write(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(RecordError, match=rf"{key} is .*, this run's is "):
        RecordFile.resume(path, HEAD | {key: value})
    assert path.read_bytes() == before
    with RecordFile.resume(path, HEAD | {"command": "python -m x --resume"}) as file:
        assert file.records == ROWS


def test_what_is_not_json_is_refused_and_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile.create(path, HEAD) as file:
        with pytest.raises(ValueError, match="not JSON compliant"):
            file.append({"x": float("nan")})
        with pytest.raises(TypeError):
            file.append({"x": object()})
        file.append({"x": 1})
    assert read_records(path)[1] == [{"x": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: no header"),
        ('{"i": 0}\n', "line 1: no header"),
        ('{"header": 5}\n', "line 1: no header"),
        ('{"header": {}}\n{"i": \n{"i": 1}\n', "line 2: .*allowed: a JSON object"),
        ('{"header": {}}\n[1]\n', r"line 2: got \[1\], allowed: a JSON object"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(RecordError, match=rf"r\.jsonl, {message}"):
        read_records(path)


def test_a_table_has_every_value_in_a_cell_of_its_own(tmp_path: Path) -> None:
    rows = [
        {"n": 200, "ttft": {"p50": 0.1 + 0.2, "p99": None}, "raw": [1, 2]},
        {"n": 1, "name": 'a,"b"\n', "ttft": {"p50": 1e-9}},
    ]
    path = tmp_path / "new" / "t.csv"
    write_table(path, rows)
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["n", "ttft.p50", "ttft.p99", "name"]
    assert float(first["ttft.p50"]) == 0.1 + 0.2 and float(second["ttft.p50"]) == 1e-9
    assert (first["ttft.p99"], first["name"], second["ttft.p99"]) == ("", "", "")
    assert second["name"] == 'a,"b"\n'


def test_rows_may_come_from_anywhere_but_are_read_once(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ({"i": i} for i in itertools.islice(itertools.count(), 3)))
    assert (tmp_path / "t.csv").read_text() == "i\n0\n1\n2\n"
