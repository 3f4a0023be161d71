"""An unsound adapter is refused with an error that names the tensor or field."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
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
from checkpoints.peft_adapter import check_adapter, read_adapter
from checkpoints.safetensors_file import SafetensorsFile
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model

CONFIG = tiny_config()
Tensors = dict[str, NDArray[Any]]
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
WEIGHTS = "adapter_model.safetensors"


def refusal(path: Path, **options: Any) -> CheckpointError:
    """The error of loading, which must also be what checking reports."""
    with pytest.raises(CheckpointError) as caught:
        read_adapter(str(path), CONFIG, **options)
    report = check_adapter(str(path), CONFIG, **options)
    assert not report.is_sound
    assert (report.problem, report.field) == (str(caught.value), caught.value.field)
    return caught.value


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


# Row 25: what is missing


@pytest.mark.row(25)
def test_missing_parts_are_named(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path / "nothing"), CheckpointNotFound)
    write_adapter(tmp_path / "a", CONFIG, seed=0)
    (tmp_path / "a" / WEIGHTS).unlink()
    error = refusal(tmp_path / "a")
    assert isinstance(error, CheckpointNotFound) and WEIGHTS in str(error)
    write_adapter(tmp_path / "b", CONFIG, seed=0)
    (tmp_path / "b" / "adapter_config.json").unlink()
    error = refusal(tmp_path / "b")
    assert isinstance(error, CheckpointNotFound) and "adapter_config.json" in str(error)


@pytest.mark.row(25)
def test_empty_files_directories_and_files_as_directories_are_refused(tmp_path: Path) -> None:
    for name in (WEIGHTS, "adapter_config.json"):
        path = tmp_path / name
        write_adapter(path, CONFIG, seed=0)
        os.truncate(path / name, 0)
        assert isinstance(refusal(path), InvalidCheckpoint)
        (path / name).unlink()
        (path / name).mkdir()
        assert "is a directory" in str(refusal(path))
    (tmp_path / "file").write_text("x")
    assert "is not a directory" in str(refusal(tmp_path / "file"))


@pytest.mark.row(25)
def test_full_model_passed_as_adapter_is_told_so(tmp_path: Path) -> None:
    write_hf_model(tmp_path, CONFIG, seed=0)
    assert "this is a full model, not an adapter" in str(refusal(tmp_path))


# Row 28: shapes and ranks


@pytest.mark.row(28)
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            Q_A,
            (8, 65),
            r"lora_A is [8, 65], base LlamaForCausalLM expects [*, 64]; trained for 'tiny'",
        ),
        (
            Q_B,
            (63, 8),
            r"lora_B is [63, 8], base LlamaForCausalLM expects [64, *]; trained for 'tiny'",
        ),
        (Q_A, (64, 8), "expects [*, 64]"),
        (Q_A, (8,), "expects [*, 64]"),
        (Q_A, (8, 64, 1), "expects [*, 64]"),
        (Q_A, (0, 64), "expects [*, 64]"),
        (Q_B, (64, 7), "lora_A has rank 8, lora_B has rank 7"),
    ],
)
def test_wrong_shape_names_tensor_and_expectation(
    name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, CONFIG, seed=0)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: np.ones(shape, np.float32)}))
    error = refusal(tmp_path)
    assert isinstance(error, InvalidCheckpoint) and error.field == name
    assert message in str(error) and "model.layers.0.self_attn.q_proj" in str(error)


@pytest.mark.row(28)
@pytest.mark.parametrize(("kept", "lost"), [("A", "B"), ("B", "A")])
def test_half_a_pair_is_refused(kept: str, lost: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, seed=0)
    change_tensors(tmp_path, lambda tensors: tensors.pop(Q_A if lost == "A" else Q_B))
    assert f"has lora_{kept} but no lora_{lost}" in str(refusal(tmp_path))


@pytest.mark.row(28)
@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"r": 16}, "r"),
        ({"r": 10**9}, "r"),
        ({"r": None, "rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"rank_pattern": {"layers.1.self_attn.v_proj": 9}}, "rank_pattern"),
    ],
)
def test_rank_that_contradicts_the_config_is_refused(
    overrides: dict[str, Any], field: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, CONFIG, seed=0, ranks=8, overrides=overrides)
    error = refusal(tmp_path)
    assert isinstance(error, InvalidCheckpoint) and error.field == field
    assert "has rank 8" in str(error)


@pytest.mark.row(28)
def test_rank_above_the_limit_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, seed=0, ranks={"q_proj": 8, "v_proj": 33})
    assert read_adapter(str(tmp_path), CONFIG, max_rank=33).max_rank == 33
    error = refusal(tmp_path, max_rank=32)
    assert "rank 33 > max_rank 32: restart with --max-rank 33" in str(error)


# Row 29: nothing is skipped


@pytest.mark.row(29)
def test_file_without_tensors_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, seed=0)
    save_file({}, tmp_path / WEIGHTS)
    assert "would give the base model" in str(refusal(tmp_path))


@pytest.mark.row(29)
@pytest.mark.row(26)
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("stray", InvalidCheckpoint, "belongs to no module"),
        ("x." + Q_A, InvalidCheckpoint, "belongs to no module"),
        (Q_A.replace("layers.0", "layers.2"), InvalidCheckpoint, "has 2 layers"),
        (Q_A.replace("layers.0", "layers.-1"), InvalidCheckpoint, "belongs to no module"),
        (Q_A.replace("self_attn", "mlp"), InvalidCheckpoint, "has no mlp.q_proj"),
        (Q_A.replace("q_proj", "qkv_proj"), InvalidCheckpoint, "has no self_attn.qkv_proj"),
        (Q_A.replace("q_proj", "k_proj"), InvalidCheckpoint, "has lora_A but no lora_B"),
        (Q_A.replace(".weight", ".default.weight"), InvalidCheckpoint, "name the same weight"),
        (Q_A.replace("base_model.model.", ""), InvalidCheckpoint, "name the same weight"),
        (Q_A.replace(".weight", ".other.weight"), InvalidCheckpoint, "belongs to no module"),
        ("y" * 10_000, InvalidCheckpoint, "belongs to no module"),
        (Q_A.replace("lora_A.weight", "lora_magnitude_vector"), UnsupportedCheckpoint, "DoRA"),
        (Q_B.replace("weight", "bias"), UnsupportedCheckpoint, "LoRA bias"),
        ("base_model.model.lm_head.lora_A.weight", UnsupportedCheckpoint, "lm_head"),
        ("base_model.model.lm_head.weight", UnsupportedCheckpoint, "lm_head"),
        ("base_model.model.model.embed_tokens.weight", UnsupportedCheckpoint, "embedding"),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            UnsupportedCheckpoint,
            "embedding",
        ),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            UnsupportedCheckpoint,
            "trained tokens",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
            UnsupportedCheckpoint,
            "base model",
        ),
    ],
)
def test_one_extra_tensor_is_refused_by_name(
    name: str, kind: type[CheckpointError], message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, CONFIG, seed=0)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: np.ones((8, 64), np.float32)}))
    error = refusal(tmp_path)
    assert isinstance(error, kind) and message in str(error)
    assert len(str(error)) < 500


@pytest.mark.row(29)
@pytest.mark.parametrize(
    "prefix", ["model.base_model.", "base_model.", "base_model.model.model.", "a."]
)
def test_wrong_prefix_is_refused(prefix: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, seed=0, prefix=prefix)
    assert "belongs to no module" in str(refusal(tmp_path))


@pytest.mark.row(29)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_proj", "o_proj"]},
            "covers model.layers.0.self_attn.o_proj",
        ),
        ({"target_modules": ["q_proj"]}, "does not cover"),
        ({"target_modules": "all-linear"}, "covers model.layers.0.self_attn.k_proj"),
        ({"target_modules": r".*\.(q|k|v)_proj"}, "covers model.layers.0.self_attn.k_proj"),
        ({"target_modules": r".*\.layers\.0\..*\.(q|v)_proj"}, "does not cover"),
        ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, "names 'c_attn'"),
        (
            {"layers_to_transform": [0]},
            "model.layers.1.self_attn.q_proj, which target_modules does not",
        ),
        (
            {"layers_to_transform": 1},
            "model.layers.0.self_attn.q_proj, which target_modules does not",
        ),
        ({"exclude_modules": ["v_proj"]}, "v_proj, which target_modules does not cover"),
        ({"exclude_modules": r".*\.0\..*"}, "q_proj, which target_modules does not cover"),
    ],
)
def test_targets_and_tensors_must_agree(
    overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, CONFIG, seed=0, overrides=overrides)
    error = refusal(tmp_path)
    assert isinstance(error, InvalidCheckpoint) and message in str(error)


# Row 30: values


@pytest.mark.row(30)
@pytest.mark.parametrize("name", [Q_A, Q_B])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_refused(
    name: str, value: float, dtype: Any, tmp_path: Path
) -> None:
    write_adapter(tmp_path, CONFIG, seed=0, dtype=np.dtype(dtype).name)
    change_tensors(tmp_path, lambda tensors: tensors[name].__setitem__((-1, -1), value))
    error = refusal(tmp_path)
    assert isinstance(error, InvalidCheckpoint) and error.field == name
    assert "NaN or infinite" in str(error)


@pytest.mark.row(30)
@pytest.mark.parametrize(
    ("name", "value", "alpha", "fits"),
    [
        (Q_A, 65504.0, 8, True),
        (Q_A, 70000.0, 8, False),
        (Q_A, -70000.0, 8, False),
        (Q_B, 40000.0, 8, True),
        (Q_B, 40000.0, 16, False),  # scaling 2 is folded into B
    ],
)
def test_values_beyond_the_target_dtype_are_refused(
    name: str, value: float, alpha: float, fits: bool, tmp_path: Path
) -> None:
    write_adapter(tmp_path, CONFIG, seed=0, alpha=alpha)
    change_tensors(tmp_path, lambda tensors: tensors[name].__setitem__((0, 0), value))
    for dtype in (None, "float32", "bfloat16"):
        assert read_adapter(str(tmp_path), CONFIG, dtype=dtype).max_rank == 8
    if fits:
        assert read_adapter(str(tmp_path), CONFIG, dtype="float16").max_rank == 8
    else:
        error = refusal(tmp_path, dtype="float16")
        assert error.field == name and "float16 ends at 65504" in str(error)


@pytest.mark.row(27)
@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int32])
def test_tensors_that_are_no_plain_floats_are_refused(dtype: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, seed=0)
    change_tensors(tmp_path, lambda tensors: tensors.update({Q_A: np.ones((8, 64), dtype)}))
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedCheckpoint) and np.dtype(dtype).name in str(error)


# Row 31: pickles


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.row(31)
@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_pickle_is_refused_and_never_run(name: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, seed=0)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / name).write_bytes(pickle.dumps(_Payload(str(tmp_path / "ran"))))
    error = refusal(tmp_path)
    assert not (tmp_path / "ran").exists()
    if name == "adapter_model.bin":
        assert isinstance(error, UnsupportedCheckpoint) and "convert with" in str(error)


# Row 34: files outside the root


@pytest.mark.row(34)
@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_links_out_of_the_root_and_special_files_are_refused(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_adapter(tmp_path / "outside", CONFIG, seed=0)
    write_adapter(root / "a", CONFIG, seed=0)
    file, outside = root / "a" / name, tmp_path / "outside" / name
    assert read_adapter(str(root / "a"), CONFIG, root=str(root)).max_rank == 8
    file.unlink()
    os.symlink(outside, file)
    assert "outside the allowed directory" in str(refusal(root / "a", root=str(root)))
    file.unlink()
    os.link(outside, file)
    assert "hard links" in str(refusal(root / "a", root=str(root)))
    file.unlink()
    os.mkfifo(file)
    assert "is a FIFO" in str(refusal(root / "a", root=str(root)))
    file.unlink()
    os.symlink("/dev/zero", file)
    assert isinstance(refusal(root / "a"), InvalidCheckpoint)


@pytest.mark.row(34)
def test_adapter_directory_outside_the_root_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "outside", CONFIG, seed=0)
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "outside", tmp_path / "root" / "link")
    for name in ("link", "../outside"):
        assert "outside" in str(refusal(tmp_path / "root" / name, root=str(tmp_path / "root")))


# Files that change meanwhile


@pytest.mark.row(27)
def test_weights_survive_their_file(tmp_path: Path) -> None:
    written = write_adapter(tmp_path, CONFIG, seed=0)
    found = read_adapter(str(tmp_path), CONFIG)
    (tmp_path / WEIGHTS).write_bytes(bytes(os.path.getsize(tmp_path / WEIGHTS)))
    os.truncate(tmp_path / WEIGHTS, 0)
    for key, module in found.modules.items():
        np.testing.assert_array_equal(module.a, written[key].a)
        np.testing.assert_array_equal(module.b, written[key].b)


@pytest.mark.row(27)
@pytest.mark.parametrize("fault", ["rewrite", "truncate", "grow"])
def test_file_changed_during_the_load_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path, CONFIG, seed=0)
    size = os.path.getsize(tmp_path / WEIGHTS)
    original = SafetensorsFile.read_copy

    def interfere(file: SafetensorsFile, name: str) -> NDArray[Any]:
        if fault == "rewrite":
            with open(tmp_path / WEIGHTS, "r+b") as handle:
                handle.seek(size - 4)
                handle.write(b"\0\0\0\0")
            os.utime(tmp_path / WEIGHTS, ns=(1, 1))
        else:
            os.truncate(tmp_path / WEIGHTS, 2000 if fault == "truncate" else size + 8)
        return original(file, name)

    monkeypatch.setattr(SafetensorsFile, "read_copy", interfere)
    with pytest.raises(InvalidCheckpoint, match=r"while being read|changed while"):
        read_adapter(str(tmp_path), CONFIG)
