"""Regular expressions that come from an adapter's config, matched safely.

PEFT matches module names with Python regular expressions. `re` backtracks, so a hostile pattern
could hold the interpreter for years; patterns whose cost is not plainly bounded are refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from checkpoints.config_fields import shown
from checkpoints.errors import InvalidCheckpoint, UnsupportedCheckpoint

_MAX_LENGTH = 2000
_MAX_OPEN_REPEATS = (
    4  # on any one path: module names have about 40 letters, 40**4 / 4! steps are bearable
)
_parser: Any = importlib.import_module("re._parser")


def compile_pattern(
    pattern: str, *, field: str, where: str, template: str = "%s"
) -> re.Pattern[str]:
    """Compile a pattern from `field` of file `where`, put into `template`.

    Raises: InvalidCheckpoint: not a regular expression. UnsupportedCheckpoint: it could take
            unbounded time (a repeat inside a repeat, alternatives inside a repeat, a
            back-reference, more than four open repeats), or is too long.
    """
    if len(pattern) > _MAX_LENGTH:
        raise UnsupportedCheckpoint(
            f"{where}: {field} holds a pattern of {len(pattern)} characters, at most {_MAX_LENGTH} "
            "are allowed",
            field=field,
        )
    try:
        tree = _parser.parse(pattern)
        compiled = re.compile(template % pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InvalidCheckpoint(
            f"{where}: {field}: {shown(pattern)} is not a regular expression: {error}", field=field
        ) from error
    if _open_repeats(tree, inside_repeat=False) > _MAX_OPEN_REPEATS:
        raise UnsupportedCheckpoint(
            f"{where}: {field}: {shown(pattern)} is too costly to match: allowed are at most "
            f"{_MAX_OPEN_REPEATS} repeats, "
            "none inside another, no alternatives inside one, no back-references",
            field=field,
        )
    return compiled


def _open_repeats(tree: Iterable[tuple[Any, Any]], *, inside_repeat: bool) -> int:
    """Repeats of varying length on the longest path; more than the limit if the structure itself is
    refused.
    """
    refused = _MAX_OPEN_REPEATS + 1
    total = 0
    for operation, argument in tree:
        name = str(operation)
        if name == "BRANCH":
            total += max(_open_repeats(b, inside_repeat=inside_repeat) for b in argument[1])
            total += refused if inside_repeat else 0
        elif "REPEAT" in name:
            least, most, body = argument
            varies = least != most
            total += _open_repeats(body, inside_repeat=inside_repeat or varies)
            total += 1 if varies else 0
            total += refused if varies and inside_repeat else 0
            # A fixed count repeats its body's choices as often.
            if not varies and (int(most) > 64 or _open_repeats(body, inside_repeat=False)):
                total += refused
        elif name in ("GROUPREF", "GROUPREF_EXISTS"):
            total += refused
        else:
            total += sum(
                _open_repeats(part, inside_repeat=inside_repeat) for part in _subpatterns(argument)
            )
    return total


def _subpatterns(argument: Any) -> Iterator[Any]:
    parts = argument if isinstance(argument, tuple) else (argument,)
    return (part for part in parts if isinstance(part, _parser.SubPattern))
