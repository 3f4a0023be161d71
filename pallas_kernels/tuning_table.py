"""Kernel configurations that were measured, one JSON file a device kind; heuristics serve the rest.

A file is `{op: {shape key: {"config": {field: value}, "us": measured microseconds}}}`,
where "us" may be `{rank: microseconds}`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any, TypeVar

import jax

C = TypeVar("C")


def device_kind() -> str:
    """The kind of device that is traced for, spelled as the name of a file ("nvidia-h200").

    Inside a mesh its devices, which need not exist; else the default device.
    """
    target = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = jax.devices()[0].device_kind if target is None else target.device_kind
    return str(kind).lower().replace(" ", "-")


def shape_key(**sizes: object) -> str:
    """The key of a shape: its named sizes in alphabetical order ("block_rows=8,width=4096")."""
    return ",".join(f"{name}={sizes[name]}" for name in sorted(sizes))


def tuned(op: str, key: str, config_class: type[C], *, device: str | None = None) -> C | None:
    """The measured configuration of `op` for this shape and device kind; None if there is none.

    Raises: TypeError: the table names a field that the configuration does not have.
    """
    entry = _table(device_kind() if device is None else device).get(op, {}).get(key)
    return None if entry is None else config_class(**entry["config"])


@functools.cache
def _table(device: str) -> dict[str, dict[str, Any]]:
    path = importlib.resources.files("pallas_kernels") / "tuning" / f"{device}.json"
    if not path.is_file():
        return {}
    table: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return table
