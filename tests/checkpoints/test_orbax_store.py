"""Converted checkpoints come back bit for bit, each leaf on the sharding asked for."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint
from checkpoints.orbax_store import (
    is_converted,
    read_converted_config,
    restore_converted,
    save_converted,
)
from checkpoints.tokenizer_files import read_chat_templates
from tests.checkpoints.fixtures import tiny_config, write_hf_model

SPECS = {
    "layers.0.qkv": (PartitionSpec(None, "tp"), (16, 32), jnp.bfloat16),
    "layers.0.o": (PartitionSpec("tp", None), (32, 16), jnp.float32),
    "norm": (PartitionSpec(), (16,), jnp.float32),
}


def _leaves(num_devices: int) -> dict[str, jax.Array]:
    mesh = jax.make_mesh((num_devices,), ("tp",), devices=jax.devices()[:num_devices])
    rng = np.random.default_rng(0)
    return {
        name: jax.device_put(
            jnp.asarray(rng.standard_normal(shape), dtype), NamedSharding(mesh, spec)
        )
        for name, (spec, shape, dtype) in SPECS.items()
    }


def _abstract(num_devices: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in _leaves(num_devices).items()
    }


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_leaves_restore_onto_any_mesh_bit_for_bit(num_devices: int, tmp_path: Path) -> None:
    saved = _leaves(8)
    path = str(tmp_path / "converted")
    save_converted(path, tiny_config(), saved)
    restored = restore_converted(path, _abstract(num_devices))
    assert restored.keys() == saved.keys()
    for name, leaf in restored.items():
        assert np.asarray(leaf).tobytes() == np.asarray(saved[name]).tobytes()
        assert leaf.dtype == saved[name].dtype
        assert len(leaf.sharding.device_set) == num_devices
        assert leaf.sharding.spec == SPECS[name][0]


def test_config_and_side_files_travel_with_the_leaves(tmp_path: Path) -> None:
    config = tiny_config(eos_token_ids=(2, 3))
    source, path = tmp_path / "source", str(tmp_path / "converted")
    write_hf_model(source, config, seed=0)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("main")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("with tools")
    save_converted(path, config, _leaves(1), source=str(source))
    assert is_converted(path) and not is_converted(str(source))
    assert read_converted_config(path) == config
    assert (tmp_path / "converted" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "converted" / "config.json").is_file()
    assert read_chat_templates(path) == {"default": "main", "tools": "with tools"}


def test_restoring_other_names_or_shapes_is_refused_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "converted")
    save_converted(path, tiny_config(), _leaves(1))
    abstract = _abstract(1)
    norm = abstract.pop("norm")
    with pytest.raises(InvalidCheckpoint, match="'norm' is missing from the model"):
        restore_converted(path, abstract)
    with pytest.raises(InvalidCheckpoint, match="'more' is missing from the checkpoint"):
        restore_converted(path, abstract | {"norm": norm, "more": norm})
    wide = jax.ShapeDtypeStruct((17,), jnp.float32, sharding=norm.sharding)
    with pytest.raises(InvalidCheckpoint, match="'norm' was saved as"):
        restore_converted(path, abstract | {"norm": wide})
    with pytest.raises(InvalidCheckpoint, match="exists already"):
        save_converted(path, tiny_config(), _leaves(1))
    with pytest.raises(CheckpointNotFound, match="not a converted checkpoint"):
        restore_converted(str(tmp_path), _abstract(1))
