"""JSON as the standard has it, with bounds: what Python's parser forgives is refused here.

Refused with BadRequest: a byte-order mark, other encodings than UTF-8, NaN and Infinity, numbers
that overflow, integers of more than 40 digits, one key twice, half a surrogate pair, nesting
beyond 64.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from serving.errors import BadRequest, shown

MAX_DEPTH = 64
MAX_DIGITS = 40

_STRINGS_AND_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRINGS_AND_BRACKETS.finditer(body):
        first = body[match.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise BadRequest(f"body: nested deeper than {MAX_DEPTH} levels")
        elif first in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadRequest(f"body: key {shown(twice)} appears twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BadRequest(f"body: a number of {len(digits)} digits, allowed: at most {MAX_DIGITS}")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadRequest(f"body: number {shown(digits, 20)} is out of range")
    return value


def _constant(name: str) -> Any:
    raise BadRequest(f"body: {name} is not JSON")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises BadRequest saying what is wrong and where."""
    if not body.strip():
        raise BadRequest("body: empty, expected a JSON object")
    if body.startswith(b"\xef\xbb\xbf"):
        raise BadRequest("body: starts with a byte-order mark; send plain UTF-8")
    _check_depth(body)
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
        if _SURROGATE_ESCAPE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as exc:
        raise BadRequest(f"body: not UTF-8 (byte {exc.start})") from exc
    except UnicodeEncodeError as exc:
        raise BadRequest("body: a string holds half of a surrogate pair") from exc
    except json.JSONDecodeError as exc:
        raise BadRequest(
            f"body: not JSON: {exc.msg} at line {exc.lineno} column {exc.colno}"
        ) from exc
    if not isinstance(value, dict):
        raise BadRequest(f"body: got {shown(value)}, expected a JSON object")
    return value
