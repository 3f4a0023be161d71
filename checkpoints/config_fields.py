"""JSON objects from files, and typed access to their fields.

`ConfigFields` wraps one object; each accessor checks type and range and raises an error that names
file, field, value and what is allowed. A field that is absent or null takes the default; without a
default it is required.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from checkpoints.errors import InvalidCheckpoint
from checkpoints.file_access import read_small_file


class _Required:
    """Marks a field that has no default."""


REQUIRED: Final = _Required()


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object.

    Raises: InvalidCheckpoint: bad UTF-8 or JSON, a duplicate key, too deep, or not an object.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateKey as error:
        raise InvalidCheckpoint(
            f"{where}: key {shown(error.key)} occurs twice", field=error.key
        ) from error
    except RecursionError as error:
        raise InvalidCheckpoint(f"{where}: JSON is nested too deeply") from error
    except ValueError as error:
        raise InvalidCheckpoint(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{where}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_fields(path: str, *, root: str | None = None) -> ConfigFields:
    """The fields of a JSON file. Raises CheckpointNotFound or InvalidCheckpoint."""
    return ConfigFields(parse_object(read_small_file(path, root=root), path), path)


def shown(value: object) -> str:
    """`value` as it may be put in a message: bounded, whatever a file holds."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class ConfigFields:
    """Read access to one JSON object."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(
        self,
        name: str,
        default: int | _Required | None = REQUIRED,
        *,
        minimum: int = 1,
        maximum: int = 2**31 - 1,
    ) -> Any:
        """An integer in [minimum, maximum]; a boolean or a float is none."""
        value = self._value(name, default)
        if value is default:
            return value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, value, "an integer")
        if not minimum <= value <= maximum:
            raise self.error(name, value, f"an integer from {minimum} to {maximum}")
        return value

    def number(
        self, name: str, default: float | _Required | None = REQUIRED, *, above: float = -math.inf
    ) -> Any:
        """A finite number greater than `above`, as float."""
        value = self._value(name, default)
        if value is default:
            return value
        return self.checked_number(name, value, above=above)

    def checked_number(self, name: str, value: object, *, above: float = -math.inf) -> float:
        """`value` as a finite float greater than `above`."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, value, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not number > above:
            limit = "" if above == -math.inf else f" greater than {above:g}"
            raise self.error(name, value, f"a finite number{limit}")
        return number

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def text(self, name: str, default: str | _Required | None = REQUIRED) -> Any:
        value = self._value(name, default)
        if value is default:
            return value
        if not isinstance(value, str):
            raise self.error(name, value, "a string")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object; empty if absent or null."""
        value = self._value(name, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them; empty if absent or null."""
        value = self._value(name, None)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(name, value, "a token id or a list of token ids")
        return tuple(ids)

    def error(self, name: str, value: object, allowed: str) -> InvalidCheckpoint:
        """The error for a field that holds `value` where `allowed` is wanted."""
        return InvalidCheckpoint(
            f"{self.where}: {name} is {shown(value)}, allowed is {allowed}", field=name
        )

    def _value(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if isinstance(default, _Required):
            raise InvalidCheckpoint(f"{self.where}: {name} is missing", field=name)
        return default


class _DuplicateKey(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(key)
        found[key] = value
    return found
