"""Tokenizer and chat template files of a Hugging Face directory: found and read, never interpreted.

Templates are returned as plain text; they come from strangers, and rendering them belongs in a
sandbox elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from checkpoints.config_fields import ConfigFields, read_fields
from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint
from checkpoints.file_access import check_directory, open_regular, read_small_file

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_DIRECTORY = "additional_chat_templates"
# What belongs to a model besides its weights; `orbax_store` copies these.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
)
_MAX_TEMPLATES = 100


def find_tokenizer(path: str, *, root: str | None = None) -> str:
    """Path of `tokenizer.json`. Raises CheckpointNotFound with what is there instead."""
    check_directory(path, root=root)
    file = os.path.join(path, TOKENIZER)
    if os.path.lexists(file):
        os.close(open_regular(file, root=root))
        return file
    slow = [
        n
        for n in ("tokenizer.model", "vocab.json", "spiece.model")
        if os.path.exists(os.path.join(path, n))
    ]
    hint = f"; it holds {slow[0]}, save it with a fast tokenizer of transformers" if slow else ""
    raise CheckpointNotFound(f"{path}: holds no {TOKENIZER}{hint}", field=TOKENIZER)


def read_tokenizer_config(path: str, *, root: str | None = None) -> dict[str, Any]:
    """`tokenizer_config.json` as it stands; empty if there is none."""
    file = os.path.join(path, TOKENIZER_CONFIG)
    return dict(read_fields(file, root=root).values) if os.path.lexists(file) else {}


def read_chat_templates(path: str, *, root: str | None = None) -> dict[str, str]:
    """Name -> Jinja source; the one to use unless another is asked for is "default".

    Later sources win: `chat_template` in tokenizer_config.json (a string, or a list of
    {name, template}), then `chat_template.jinja`, then `additional_chat_templates/<name>.jinja`.
    """
    config = ConfigFields(
        read_tokenizer_config(path, root=root), os.path.join(path, TOKENIZER_CONFIG)
    )
    found = _from_config(config)
    main = os.path.join(path, TEMPLATE)
    if os.path.lexists(main):
        found["default"] = _read_text(main, root)
    directory = os.path.join(path, TEMPLATE_DIRECTORY)
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
        if name.endswith(".jinja"):
            found[name.removesuffix(".jinja")] = _read_text(os.path.join(directory, name), root)
        if len(found) > _MAX_TEMPLATES:
            raise InvalidCheckpoint(f"{directory}: holds more than {_MAX_TEMPLATES} templates")
    return found


def _from_config(config: ConfigFields) -> dict[str, str]:
    value = config.values.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    allowed = "a string, or a list of objects with name and template"
    if not isinstance(value, list) or len(value) > _MAX_TEMPLATES:
        raise config.error("chat_template", value, allowed)
    found: dict[str, str] = {}
    for entry in value:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        template = entry.get("template") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not isinstance(template, str):
            raise config.error("chat_template", entry, allowed)
        found[name] = template
    return found


def _read_text(path: str, root: str | None) -> str:
    try:
        return read_small_file(path, root=root).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint(f"{path}: is not UTF-8 text") from error
