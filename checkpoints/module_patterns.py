"""Regular expressions from an adapter's config, matched against module paths in bounded time.

PEFT matches with Python's `re`, which backtracks: a hostile pattern could hold the interpreter for
years. Here the syntax tree of `re` is run over sets of positions instead, every alternative at
once, and the work is counted against a budget. The answers are those of `re` for everything but the
constructs that need backtracking, which are refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from checkpoints.config_fields import shown
from checkpoints.errors import InvalidCheckpoint, UnsupportedCheckpoint

_MAX_LENGTH = 2000
_MAX_STEPS = 10_000_000  # a few seconds; usual patterns over 80 layers take a twentieth
_PLAIN = re.compile(r"[\w.]*")  # no repeats and no alternatives: `re` is fast and safe
_parser: Any = importlib.import_module("re._parser")

Positions = frozenset[int]
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda letter: letter.isalnum() or letter == "_",
}


class MatchBudget:
    """Steps that all patterns of one config may take together."""

    def __init__(self, steps: int = _MAX_STEPS) -> None:
        self.steps = steps


class ModulePattern:
    """One compiled pattern. `field` and `where` name its origin in messages."""

    def __init__(self, pattern: str, budget: MatchBudget, *, field: str, where: str) -> None:
        """Compile, and refuse what cannot be matched in bounded time.

        Raises: InvalidCheckpoint: not a regular expression. UnsupportedCheckpoint: too long, or
                with flags, back-references, look-behind, atomic groups or possessive repeats.
        """
        self._pattern, self._budget, self._field, self._where = pattern, budget, field, where
        if len(pattern) > _MAX_LENGTH:
            raise self._refusal(f"has {len(pattern)} characters, at most {_MAX_LENGTH} are allowed")
        self._plain = _PLAIN.fullmatch(pattern) is not None
        try:
            self._tree = _parser.parse(pattern)
            self._full = re.compile(pattern) if self._plain else None
            self._suffix = re.compile(rf"(.*\.)?({pattern})$") if self._plain else None
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidCheckpoint(
                f"{where}: {field}: {shown(pattern)} is not a regular expression: {error}",
                field=field,
            ) from error
        if self._tree.state.flags & ~re.UNICODE.value:
            raise self._refusal("sets flags, which are not supported")
        try:
            self._run(self._tree, frozenset({0}), "")  # finds constructs that are not supported
        except RecursionError as error:
            raise self._refusal("is nested too deeply") from error

    def fullmatch(self, path: str) -> bool:
        """As `re.fullmatch(pattern, path)`."""
        if self._full is not None:
            return self._full.fullmatch(path) is not None
        return len(path) in self._run(self._tree, frozenset({0}), path)

    def match_suffix(self, path: str) -> bool:
        """As `re.match(rf"(.*\\.)?({pattern})$", path)`: PEFT's rule for rank and alpha."""
        if self._suffix is not None:
            return self._suffix.match(path) is not None
        starts = frozenset({0} | {i + 1 for i, letter in enumerate(path) if letter == "."})
        return len(path) in self._run(self._tree, starts, path)

    def _refusal(self, why: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(
            f"{self._where}: {self._field}: pattern {shown(self._pattern)} {why}", field=self._field
        )

    def _run(self, tree: Any, starts: Positions, path: str) -> Positions:
        """Every position where a match of `tree` may end that began at one of `starts`."""
        positions = starts
        for operation, argument in tree:
            self._budget.steps -= 1 + len(positions)
            if self._budget.steps < 0:
                raise self._refusal("is too costly to match")
            positions = self._apply(str(operation), argument, positions, path)
            if not positions and path:
                return positions
        return positions

    def _apply(self, name: str, argument: Any, starts: Positions, path: str) -> Positions:
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return frozenset(
                p + 1 for p in starts if p < len(path) and _accepts(name, argument, path[p])
            )
        if name == "SUBPATTERN":
            if argument[1] or argument[2]:
                raise self._refusal("sets flags, which are not supported")
            return self._run(argument[3], starts, path)
        if name == "BRANCH":
            return frozenset().union(*(self._run(branch, starts, path) for branch in argument[1]))
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(argument, starts, path)
        if name == "AT":
            return frozenset(p for p in starts if _holds(str(argument), p, path))
        if name in ("ASSERT", "ASSERT_NOT") and argument[0] > 0:
            wanted = name == "ASSERT"
            return frozenset(
                p for p in starts if bool(self._run(argument[1], frozenset({p}), path)) == wanted
            )
        raise self._refusal(f"uses {name.lower().replace('_', ' ')}, which is not supported")

    def _repeat(self, argument: tuple[Any, Any, Any], starts: Positions, path: str) -> Positions:
        least, most, body = int(argument[0]), int(argument[1]), argument[2]
        positions = starts
        for _ in range(least):
            following = self._run(body, positions, path)
            if following == positions:  # a fixed point: more rounds change nothing
                break
            positions = following
        found = frontier = positions
        for _ in range(most - least):
            frontier = self._run(body, frontier, path) - found
            if not frontier:
                break
            found |= frontier
        return found


def _accepts(name: str, argument: Any, letter: str) -> bool:
    if name == "ANY":
        return letter != "\n"
    if name in ("LITERAL", "NOT_LITERAL"):
        return (ord(letter) == int(argument)) == (name == "LITERAL")
    items = [(str(operation), value) for operation, value in argument]
    negated = items[0][0] == "NEGATE"
    return any(_is_in(item, value, letter) for item, value in items[negated:]) != negated


def _is_in(item: str, value: Any, letter: str) -> bool:
    if item == "LITERAL":
        return ord(letter) == int(value)
    if item == "RANGE":
        return bool(value[0] <= ord(letter) <= value[1])
    category = str(value).removeprefix("CATEGORY_")
    return _CATEGORIES[category.removeprefix("NOT_")](letter) != category.startswith("NOT_")


def _holds(anchor: str, position: int, path: str) -> bool:
    if anchor in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return position == 0
    if anchor in ("AT_END", "AT_END_STRING"):
        return position == len(path)
    word = _CATEGORIES["WORD"]
    before = position > 0 and word(path[position - 1])
    after = position < len(path) and word(path[position])
    is_boundary = before != after
    return is_boundary if anchor == "AT_BOUNDARY" else not is_boundary
