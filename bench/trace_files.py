"""Trace files, CSV or JSONL: our own, and recorded ones with the columns of BurstGPT or Azure.

    trace = read_trace(Path("BurstGPT_1.csv"), drop_failed=True)

The columns say which it is:

- ours: arrival_s, num_prompt_tokens, num_output_tokens, and if wanted adapter (a number, or
  nothing for the base) and tenant. Times are kept. JSONL of ours may start with a header line.
- BurstGPT (github.com/HPMLL/BurstGPT): Timestamp in seconds, Request tokens, Response tokens;
  Model becomes the tenant. Failed requests there have a response of 0 tokens: refused unless
  `drop_failed` leaves them out.
- Azure LLM inference (github.com/Azure/AzurePublicDataset): TIMESTAMP as a date and time (UTC if it
  names no zone), ContextTokens, GeneratedTokens.

Recorded times count from the earliest request. Rows need not be in order; requests of one moment
keep the file's order. Whatever else is wrong with a row is refused: a benchmark on half a trace
is a wrong number.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from bench.record import command, commit
from bench.trace import Request, Trace, default_tenant

MAX_TOKENS = 10_000_000


class TraceError(ValueError):
    """A row that is not what it has to be: file, line, column, what came, what is allowed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Dialect:
    """The columns of one kind of file."""

    arrival: str
    prompt: str
    output: str
    optional: tuple[str, ...]
    read_arrival: Callable[[Any], Decimal | None]
    arrival_form: str
    tenant: str | None = None
    adapter: str | None = None
    is_recorded: bool = True  # times count from anywhere

    @property
    def required(self) -> tuple[str, ...]:
        return (self.arrival, self.prompt, self.output)


_DECIMAL = re.compile(r"\d{1,15}(\.\d{1,20})?", re.ASCII)


def _seconds(value: Any) -> Decimal | None:
    """A number of seconds, at least 0; None if it is none."""
    if isinstance(value, float):
        return Decimal(repr(value)) if 0 <= value < 1e15 else None
    is_number = not isinstance(value, bool) and _DECIMAL.fullmatch(str(value))
    return Decimal(value) if is_number else None


_MOMENT = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)?", re.ASCII
)


def _moment(value: Any) -> Decimal | None:
    """Seconds since 1970 of a date and time; None if it is none."""
    match = _MOMENT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    day, clock, fraction, zone = match.groups()
    zone = "+00:00" if zone in (None, "Z") else zone
    try:
        whole = datetime.datetime.fromisoformat(f"{day}T{clock}{zone}")
    except ValueError:  # a 13th month
        return None
    return Decimal(int(whole.timestamp())) + Decimal(f"0{fraction or '.0'}")


_SECONDS_FORM = "seconds as a decimal number, at least 0"
DIALECTS: dict[str, _Dialect] = {
    "ours": _Dialect(
        arrival="arrival_s", prompt="num_prompt_tokens", output="num_output_tokens",
        optional=("adapter", "tenant"), tenant="tenant", adapter="adapter",
        read_arrival=_seconds, arrival_form=_SECONDS_FORM, is_recorded=False,
    ),
    "BurstGPT": _Dialect(
        arrival="Timestamp", prompt="Request tokens", output="Response tokens",
        optional=("Session ID", "Elapsed time", "Model", "Total tokens", "Log Type"),
        tenant="Model", read_arrival=_seconds, arrival_form=_SECONDS_FORM,
    ),
    "Azure": _Dialect(
        arrival="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens", optional=(),
        read_arrival=_moment, arrival_form="a date and time such as 2023-11-16 18:17:03.979",
    ),
}  # fmt: skip


def read_trace(path: Path, *, drop_failed: bool = False, limit: int | None = None) -> list[Request]:
    """The requests of a file by arrival; if `limit` is given, the first so many of the file.

    Raises: TraceError: the file, line and column that is wrong, what it holds, what is allowed.
    """
    rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
    found: list[tuple[Decimal, Request]] = []
    dialect: _Dialect | None = None
    for number, row in rows:
        where = f"{path}, line {number}"
        dialect = dialect or _dialect(where, row)
        _check_columns(where, row, dialect)
        read = _request(where, row, dialect, drop_failed)
        if read is not None:
            found.append(read)
        if len(found) == limit:
            break
    if not found or dialect is None:
        raise TraceError(f"{path}: got no request, allowed: at least one")
    found.sort(key=lambda pair: pair[0])
    origin = found[0][0] if dialect.is_recorded else Decimal(0)
    return [
        dataclasses.replace(request, arrival_s=round(float(arrival - origin), 6))
        for arrival, request in found
    ]


def write_trace(path: Path, trace: Trace, settings: dict[str, Any]) -> None:
    """Write a trace as JSONL under a header that says how it was made."""
    header = {"bench": "workloads", "command": command(), "commit": commit(), "settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"header": header}) + "\n")
        for request in trace:
            file.write(json.dumps(dataclasses.asdict(request)) + "\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as exc:
                raise TraceError(
                    f"{path}, line {number}: got byte {line[exc.start]:#04x}, allowed: UTF-8"
                ) from exc
            yield number, text


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    columns: list[str] = []
    try:
        for values in reader:
            if not columns:
                columns = values
                if len(set(columns)) != len(columns):
                    raise TraceError(f"{path}, line 1: got {columns}, allowed: each column once")
                continue
            if len(values) != len(columns):
                raise TraceError(
                    f"{path}, line {reader.line_num}: got {len(values)} values, "
                    f"allowed: {len(columns)}, one for each column"
                )
            yield reader.line_num, dict(zip(columns, values, strict=True))
    except csv.Error as exc:
        raise TraceError(f"{path}, line {reader.line_num}: {exc}, allowed: CSV") from exc


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except _Twice as exc:
            raise TraceError(f"{path}, line {number}, column {str(exc)!r}: given twice") from exc
        except json.JSONDecodeError as exc:
            raise TraceError(
                f"{path}, line {number}: {exc.msg} at column {exc.colno}, allowed: a JSON object"
            ) from exc
        if not isinstance(row, dict):
            raise TraceError(
                f"{path}, line {number}: got {line.strip()[:40]!r}, allowed: a JSON object"
            )
        if number == 1 and row.keys() == {"header"}:
            continue
        yield number, row


class _Twice(Exception):
    """A key that comes twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(key)
        found[key] = value
    return found


def _dialect(where: str, row: dict[str, Any]) -> _Dialect:
    for dialect in DIALECTS.values():
        if row.keys() >= set(dialect.required):
            return dialect
    allowed = "; ".join(f"{name}: {', '.join(d.required)}" for name, d in DIALECTS.items())
    raise TraceError(f"{where}: got columns {sorted(row)}, allowed: {allowed}")


def _check_columns(where: str, row: dict[str, Any], dialect: _Dialect) -> None:
    known = {*dialect.required, *dialect.optional}
    for name in dialect.required:
        if name not in row:
            raise TraceError(f"{where}, column {name!r}: got nothing, allowed: a value")
    for name in row.keys() - known:
        raise TraceError(f"{where}, column {name!r}: not known, allowed: {sorted(known)}")


def _request(
    where: str, row: dict[str, Any], dialect: _Dialect, drop_failed: bool
) -> tuple[Decimal, Request] | None:
    arrival = dialect.read_arrival(row[dialect.arrival])
    if arrival is None:
        got = row[dialect.arrival]
        raise TraceError(
            f"{where}, column {dialect.arrival!r}: got {got!r}, allowed: {dialect.arrival_form}"
        )
    least = 0 if drop_failed else 1
    prompt = _integer(where, dialect.prompt, row[dialect.prompt], least, MAX_TOKENS)
    output = _integer(where, dialect.output, row[dialect.output], least, MAX_TOKENS)
    if prompt == 0 or output == 0:
        return None
    named = row.get(dialect.adapter) if dialect.adapter else None
    adapter = None if named in (None, "") else _integer(where, "adapter", named, 0, 2**31 - 1)
    tenant = row.get(dialect.tenant) if dialect.tenant else None
    if tenant is not None and not isinstance(tenant, str):
        raise TraceError(f"{where}, column {dialect.tenant!r}: got {tenant!r}, allowed: text")
    return arrival, Request(
        arrival_s=0.0, adapter=adapter, tenant=tenant or default_tenant(adapter),
        num_prompt_tokens=prompt, num_output_tokens=output,
    )  # fmt: skip


def _integer(where: str, column: str, value: Any, least: int, most: int) -> int:
    is_whole = not isinstance(value, bool | float) and re.fullmatch(r"\d{1,10}", str(value), re.A)
    if is_whole and least <= int(value) <= most:
        return int(value)
    hint = "; --drop-failed leaves failed requests out" if str(value) == "0" and least else ""
    raise TraceError(
        f"{where}, column {column!r}: got {value!r}, "
        f"allowed: a whole number from {least} to {most}{hint}"
    )
