"""A checkpoint opens only if it holds exactly the tensors of its model, and opening it reads none
of them.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from checkpoints.errors import (
    CheckpointError,
    CheckpointNotFound,
    InvalidCheckpoint,
    UnsupportedCheckpoint,
)
from checkpoints.hf_weights import expected_tensors, open_weights
from checkpoints.model_config import ModelConfig
from tests.checkpoints.fixtures import make_weights, tiny_config, write_hf_model
from tests.open_files import open_files

CONFIG = tiny_config()
Q = "model.layers.1.self_attn.q_proj.weight"
Tensors = dict[str, NDArray[Any]]


def refusal(path: Path, config: ModelConfig = CONFIG) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_weights(str(path), config)
    return caught.value


def change(path: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        {"qk_norm": True, "head_dim": 32},
        {"tie_word_embeddings": True, "num_layers": 3},
    ],
)
def test_expected_tensors_are_those_of_the_fixture(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    shapes = {name: array.shape for name, array in make_weights(config, 0).items()}
    assert expected_tensors(config) == shapes


@pytest.mark.parametrize("name", list(expected_tensors(tiny_config(num_layers=1))))
def test_each_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    config = tiny_config(num_layers=1)
    write_hf_model(tmp_path, config, seed=0)
    change(tmp_path, lambda tensors: tensors.pop(name))
    error = refusal(tmp_path, config)
    assert isinstance(error, InvalidCheckpoint) and error.field == name and "missing" in str(error)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", Q.replace("weight", "bias"), "score.weight"]
)
def test_unexpected_tensor_is_named(name: str, tmp_path: Path) -> None:
    write_hf_model(tmp_path, CONFIG, seed=0)
    change(tmp_path, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    error = refusal(tmp_path)
    assert error.field == name and "not part of this model" in str(error)


def test_rotary_frequencies_of_old_exports_are_passed_over(tmp_path: Path) -> None:
    written = write_hf_model(tmp_path, CONFIG, seed=0)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(tmp_path, lambda tensors: tensors.update({name: np.zeros(8, np.float32)}))
    with open_weights(str(tmp_path), CONFIG) as weights:
        assert set(weights.names) == set(written)


def test_wrong_shape_and_dtype_are_named(tmp_path: Path) -> None:
    write_hf_model(tmp_path, CONFIG, seed=0)
    change(tmp_path, lambda tensors: tensors.update({Q: tensors[Q].reshape(32, 128)}))
    error = refusal(tmp_path)
    assert error.field == Q and "is [32, 128], the config asks for [64, 64]" in str(error)
    change(tmp_path, lambda tensors: tensors.update({Q: np.zeros((64, 64), np.int8)}))
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedCheckpoint) and "int8" in str(error)


@pytest.mark.parametrize("head", ["absent", "equal", "different", "other dtype"])
def test_tied_head_may_be_absent_or_equal(head: str, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True, vocab_size=5000)
    written = write_hf_model(tmp_path, config, seed=0)
    copy = written["model.embed_tokens.weight"].copy()
    if head == "different":
        copy[-1, -1] += 1
    if head == "other dtype":
        copy = copy.astype(np.float16)
    if head != "absent":
        change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": copy}))
    if head in ("absent", "equal"):
        with open_weights(str(tmp_path), config) as weights:
            assert "lm_head.weight" not in weights.names
    else:
        assert refusal(tmp_path, config).field == "tie_word_embeddings"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({Q: "../model-00001-of-00002.safetensors"}, "allowed is a .safetensors file name"),
        ({Q: "model.bin"}, "allowed is a .safetensors file name"),
        ({Q: 7}, "allowed is a .safetensors file name"),
        ({Q: "model-00003-of-00003.safetensors"}, "which the index places in"),
        ({"stray": "model-00001-of-00002.safetensors"}, "does not hold 'stray'"),
    ],
)
def test_index_and_shards_must_agree(edit: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_hf_model(tmp_path, CONFIG, seed=0, num_shards=2)
    os.link(
        tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00003-of-00003.safetensors"
    )
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] |= edit
    index.write_text(json.dumps(fields))
    assert message in str(refusal(tmp_path))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_hf_model(tmp_path, CONFIG, seed=0, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    error = refusal(tmp_path)
    assert isinstance(error, CheckpointNotFound) and "model-00002-of-00003" in str(error)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path), CheckpointNotFound)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedCheckpoint) and "save_pretrained" in str(error)


def test_opening_reads_no_tensor_and_reading_copies_none(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=40_000)  # 10 MB each of embedding and head
    write_hf_model(tmp_path, config, seed=0)
    tracemalloc.start()
    with open_weights(str(tmp_path), config) as weights:
        total = sum(float(weights.read(name)[..., :1].sum()) for name in weights.names)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.isfinite(total)
    assert peak < 1 << 20


def test_views_outlive_the_files_and_descriptors_are_closed(tmp_path: Path) -> None:
    written = write_hf_model(tmp_path, CONFIG, seed=0, num_shards=3)
    with open_weights(str(tmp_path), CONFIG) as weights:
        view = weights.read(Q)
    np.testing.assert_array_equal(view, written[Q])
    del view
    before = open_files()
    with open_weights(str(tmp_path), CONFIG):
        pass
    with pytest.raises(InvalidCheckpoint):
        open_weights(str(tmp_path), tiny_config(hidden_size=128))
    assert open_files() <= before
