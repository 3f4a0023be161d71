"""What the endpoints that load and unload adapters are asked, and what may be an adapter's name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from serving.errors import shown
from serving.fields import Fields
from sloraj.errors import InvalidRequest

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9._/@+-]{1,256}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    adapter_id: str
    path: str
    replace: bool
    pinned: bool


def is_adapter_name(name: str) -> bool:
    """Letters, digits and ``._/@+-``, 1 to 256 of them, not absolute, no segment ``..``."""
    return bool(
        _ADAPTER_NAME.fullmatch(name) and not name.startswith("/") and ".." not in name.split("/")
    )


def _adapter_id(fields: Fields, base_id: str) -> str:
    name = fields.string("lora_name")
    if name is None and not fields.has("lora_name"):
        fields.refuse("lora_name", "a string")
    elif name is not None and not is_adapter_name(name):
        fields.refuse("lora_name", "1 to 256 of A-Z a-z 0-9 . _ / @ + -, not absolute, no '..'")
    elif name == base_id:
        fields.refuse("lora_name", "a name other than the base model's")
    return name or ""


def parse_load(values: dict[str, Any], base_id: str) -> LoadRequest:
    fields = Fields(values)
    adapter_id, path = _adapter_id(fields, base_id), fields.string("lora_path")
    if not path and not isinstance(values.get("lora_path"), list | dict | int | float):
        fields.refuse("lora_path", "a directory")
    elif path and ("\0" in path or len(path) > 4096):
        fields.refuse("lora_path", "at most 4096 characters, no NUL")
    request = LoadRequest(
        adapter_id=adapter_id,
        path=path or "",
        replace=fields.boolean("load_inplace"),
        pinned=fields.boolean("pinned"),
    )
    fields.finish()
    return request


def parse_unload(values: dict[str, Any]) -> str:
    """The adapter to unload; `lora_int_id` is ignored, names identify adapters."""
    name = values.get("lora_name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"lora_name: got {shown(name)}, allowed: a string", param="lora_name")
    return name
