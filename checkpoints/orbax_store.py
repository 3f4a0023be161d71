"""Converted checkpoints: the engine's own leaves, saved so that they restore onto a mesh.

A converted directory holds `leaves/` (Orbax), `sloraj.json` (format, the model's config, and the
number of devices that the leaves are laid out for), and the side files of the model: config.json,
tokenizer and chat templates. The only module of this package that imports JAX.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from checkpoints.config_fields import read_fields
from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.file_access import check_directory
from checkpoints.model_config import ModelConfig, RopeConfig
from checkpoints.tokenizer_files import SIDE_FILES, TEMPLATE_DIRECTORY

MANIFEST = "sloraj.json"
LEAVES = "leaves"
_FORMAT = 1


def is_converted(path: str) -> bool:
    """Whether `path` is a directory that `save_converted` finished."""
    return os.path.isfile(os.path.join(path, MANIFEST)) and os.path.isdir(
        os.path.join(path, LEAVES)
    )


def save_converted(
    path: str,
    config: ModelConfig,
    leaves: Mapping[str, jax.Array],
    *,
    num_devices: int = 1,
    source: str | None = None,
) -> None:
    """Write `leaves` (name -> array, sharded or not) to the new directory `path`.

    `num_devices` is only noted: leaves may mean different things on another number of devices. The
    side files of the model directory `source` are copied beside them. The manifest is written
    last: a directory without it is not a converted checkpoint.
    Raises: InvalidCheckpoint: the directory exists already, or a name holds a slash, which Orbax
            would take for a level.
    """
    if os.path.exists(path):
        raise InvalidCheckpoint(f"{path}: exists already; converting never overwrites")
    for name in leaves:
        if not name or "/" in name:
            raise InvalidCheckpoint(f"leaf name {name!r} is empty or holds a slash", field=name)
    os.makedirs(path)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(os.path.join(path, LEAVES)), dict(leaves))
        checkpointer.wait_until_finished()
    if source is not None:
        _copy_side_files(source, path)
    manifest = {
        "format": _FORMAT,
        "config": dataclasses.asdict(config),
        "num_devices": num_devices,
        "leaves": {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in leaves.items()},
    }
    with open(os.path.join(path, MANIFEST), "x", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)


def read_converted_config(path: str) -> ModelConfig:
    """The config that was saved. Raises as `restore_converted`."""
    manifest = _manifest(path)
    try:
        fields = dict(manifest["config"])
        fields["rope"] = RopeConfig(**fields["rope"])
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return ModelConfig(**fields)
    except (KeyError, TypeError) as error:
        raise InvalidCheckpoint(
            f"{path}: {MANIFEST} holds no usable config: {error}", field="config"
        ) from error


def read_num_devices(path: str) -> int:
    """How many devices the leaves were laid out for. Raises as `restore_converted`."""
    _manifest(path)
    found: int = read_fields(os.path.join(path, MANIFEST)).integer("num_devices")
    return found


def restore_converted(
    path: str, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Restore exactly the leaves of `abstract`, each in the dtype and on the sharding it carries.

    Every device reads only its bytes.
    Raises: CheckpointNotFound: not a converted directory. UnsupportedCheckpoint: a newer format.
            InvalidCheckpoint: names or shapes differ from what was saved.
    """
    saved: dict[str, Any] = _manifest(path)["leaves"]
    if missing := sorted(set(abstract) ^ set(saved)):
        where = "the checkpoint" if missing[0] in abstract else "the model"
        raise InvalidCheckpoint(
            f"{path}: leaf {missing[0]!r} is missing from {where}", field=missing[0]
        )
    for name, leaf in abstract.items():
        if saved[name][0] != list(leaf.shape):
            raise InvalidCheckpoint(
                f"{path}: leaf {name!r} was saved as {saved[name][0]}, the model has "
                f"{list(leaf.shape)}",
                field=name,
            )
    with ocp.StandardCheckpointer() as checkpointer:
        restored: dict[str, jax.Array] = checkpointer.restore(
            os.path.abspath(os.path.join(path, LEAVES)), dict(abstract)
        )
    return restored


def _manifest(path: str) -> dict[str, Any]:
    check_directory(path)
    if not is_converted(path):
        raise CheckpointNotFound(
            f"{path}: is not a converted checkpoint (no {MANIFEST} or no {LEAVES}/)"
        )
    fields = read_fields(os.path.join(path, MANIFEST))
    if fields.integer("format") != _FORMAT:
        raise UnsupportedCheckpoint(
            f"{fields.where}: format is {fields.values['format']}, supported is {_FORMAT}",
            field="format",
        )
    fields.mapping("leaves")
    return dict(fields.values)


def _copy_side_files(source: str, target: str) -> None:
    for name in SIDE_FILES:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    templates = os.path.join(source, TEMPLATE_DIRECTORY)
    if os.path.isdir(templates):
        shutil.copytree(templates, os.path.join(target, TEMPLATE_DIRECTORY))
