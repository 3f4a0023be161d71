"""Command-line options made from the fields of config dataclasses, so that the two cannot drift
apart.

A field `max_num_seqs: int = 64  # comment` becomes `--max-num-seqs`; the comment is its help.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from serving.adapter_schemas import is_adapter_name
from sloraj.errors import ConfigError

ALIASES = {  # what users of other servers type
    "adapters": ("--lora-modules", "--lora-paths"),
    "max_rank": ("--max-lora-rank",),
    "max_adapter_slots": ("--max-loras", "--max-loras-per-batch"),
    "tensor_parallel_size": ("-tp", "--tp"),
    "queue_order": ("--scheduling-policy",),
}
SECRETS = ("api_key", "admin_api_key")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size(text: str) -> int:
    """Bytes from "24GB" (powers of 1000), "24GiB" (powers of 1024) or a plain number."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB, 24GB or 1000000")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])


def adapter(text: str) -> tuple[str, str]:
    """`name=path`, a path (named after its directory), or JSON `{"name": ..., "path": ...}`."""
    name, path = _name_and_path(text)
    if not is_adapter_name(name) or not path:
        raise argparse.ArgumentTypeError(
            f"{text!r}: an adapter's name is 1 to 256 of A-Z a-z 0-9 . _ / @ + -; give name=path"
        )
    return name, path


def _name_and_path(text: str) -> tuple[str, str]:
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
            name = given.get("name", given.get("lora_name"))
            path = given.get("path", given.get("lora_path"))
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {exc}") from exc
        if not isinstance(name, str) or not isinstance(path, str):
            raise argparse.ArgumentTypeError(f"{text!r} has no 'name' and 'path'")
        return name, path
    name, equals, path = text.partition("=")
    if not equals:
        return text.rstrip("/").rpartition("/")[2], text
    return name, path


def tenant_weights(text: str) -> list[tuple[str, float]]:
    """`name=2.0,other=0.5`, or JSON `{"name": 2.0}` for names with a comma or an equals sign."""
    if text.lstrip().startswith("{"):
        try:
            pairs = list(json.loads(text).items())
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {exc}") from exc
    else:
        pairs = [(name, weight) for name, _, weight in (p.partition("=") for p in text.split(","))]
    try:
        return [(name, float(weight)) for name, weight in pairs]
    except (TypeError, ValueError) as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: give name=weight, and more: {exc}") from exc


def _plain_type(hint: Any) -> Any:
    """`int | None` -> int; anything else as it is."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _help(config: type) -> dict[str, str]:
    """Each field's trailing comment in the source of the class."""
    found = re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(config), re.MULTILINE)
    return {name: text.replace("%", "%%") for name, text in found}


def add_options(
    parser: argparse.ArgumentParser, config: type, *, skip: tuple[str, ...] = ()
) -> None:
    """One option for every field of a config dataclass, but for those in `skip`."""
    group = parser.add_argument_group(config.__name__)
    hints, comments = typing.get_type_hints(config), _help(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        kind = _plain_type(hints[field.name])
        flags = [f"--{field.name.replace('_', '-')}", *ALIASES.get(field.name, ())]
        text = comments.get(field.name, "")
        if field.default not in (None, dataclasses.MISSING, ()):
            text = f"{text} (default: {field.default})".strip()
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
        elif field.name == "tenant_weights":
            group.add_argument(*flags, type=tenant_weights, action="extend", **common)
        elif typing.get_origin(kind) is tuple:
            convert: Callable[[str], Any] = adapter if field.name == "adapters" else str
            group.add_argument(*flags, type=convert, nargs="+", action="extend", **common)
        else:
            convert = size if field.name.endswith("_bytes") else kind
            group.add_argument(*flags, type=convert, metavar=kind.__name__.upper(), **common)


def read_config(config: type[Any], args: argparse.Namespace) -> Any:
    """The dataclass, with the options given; the rest keeps its defaults. Raises ConfigError."""
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(config)
        if hasattr(args, field.name)
    }
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return config(**values)
    except TypeError as exc:
        raise ConfigError(str(exc)) from exc


def printable(config: Any) -> dict[str, Any]:
    """The config as plain values, keys masked."""
    values = dataclasses.asdict(config)
    return {
        name: "***" if name in SECRETS and value is not None else value
        for name, value in values.items()
    }
