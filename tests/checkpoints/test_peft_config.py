"""Every field of an adapter config is honoured, without effect, or refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from checkpoints.errors import CheckpointError, InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.peft_config import read_peft_config
from tests.checkpoints.fixtures import tiny_config, write_adapter

pytestmark = pytest.mark.row(26)
CONFIG = tiny_config()


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_peft_config(str(path), num_layers=CONFIG.num_layers)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("r", value) for value in (0, -1, "8", 8.0, True, [8], 2**40)],
        *[
            ("lora_alpha", v)
            for v in ("16", True, [16], 0, 0.0, float("nan"), float("inf"), 10**400)
        ],
        *[("use_rslora", value) for value in ("true", 1)],
        *[
            ("rank_pattern", value)
            for value in (["q_proj"], 8, {"(": 8}, dict.fromkeys(map(str, range(5000)), 8))
        ],
        *[("rank_pattern[q_proj]", {"q_proj": value}) for value in ("8", 0, None, 1.5)],
        *[("alpha_pattern", value) for value in ("q_proj", {"*": 8})],
        *[("alpha_pattern[q_proj]", {"q_proj": value}) for value in ("8", 0, float("nan"))],
        *[
            ("target_modules", value)
            for value in (7, [1], [], "", {"q_proj": 1}, "(", [["q_proj"]])
        ],
        *[("exclude_modules", value) for value in (7, [None], "[")],
        *[("layers_to_transform", value) for value in ("0", [2], -1, [0.0], [True], {})],
        ("layers_pattern", "blocks"),
        ("base_model_name_or_path", 7),
        ("peft_type", 7),
    ],
)
def test_field_of_wrong_type_or_range_is_refused_by_name(
    field: str, value: object, tmp_path: Path
) -> None:
    overrides = {field.partition("[")[0]: value}
    if field == "layers_pattern":
        overrides["layers_to_transform"] = [0]
    write_adapter(tmp_path, CONFIG, seed=0, overrides=overrides)
    error = refusal(tmp_path)
    assert isinstance(error, InvalidCheckpoint) and error.field == field
    assert field in str(error) and len(str(error)) < 500


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("peft_type", value) for value in ("IA3", "PREFIX_TUNING", "ADALORA", "lora")],
        ("use_dora", True),
        *[("bias", value) for value in ("all", "lora_only", True)],
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        *[
            ("init_lora_weights", value)
            for value in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", 1, "new")
        ],
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"rank": 1}),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("target_parameters", ["mlp.experts"]),
        ("trainable_token_indices", [5]),
        *[(f"{name}_config", {"x": 1}) for name in ("kasa", "velora", "monteclora", "arrow")],
        ("megatron_config", {"x": 1}),
        ("field_from_the_future", 0),
        ("field_from_the_future", "x"),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ["q_proj", "model.embed_tokens"]),
        ("target_modules", r"(q)_\1"),
        ("rank_pattern", {"(?i)Q_PROJ": 8}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    field: str, value: object, tmp_path: Path
) -> None:
    write_adapter(tmp_path, CONFIG, seed=0, overrides={field: value})
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedCheckpoint) and error.field == field
    assert field in str(error)


@pytest.mark.parametrize(
    "overrides",
    [
        {"fan_in_fan_out": True, "lora_dropout": 0.1, "task_type": None, "inference_mode": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "revision": "main"},
        {"loftq_config": {}, "field_from_the_future": None, "another": [], "third": False},
        {"bias": None, "modules_to_save": [], "peft_version": "0.99", "auto_mapping": {"x": 1}},
    ],
)
def test_fields_without_effect_change_nothing(overrides: dict[str, Any], tmp_path: Path) -> None:
    write_adapter(tmp_path / "plain", CONFIG, seed=0)
    write_adapter(tmp_path / "other", CONFIG, seed=0, overrides=overrides)
    plain = read_peft_config(str(tmp_path / "plain"), num_layers=2)
    other = read_peft_config(str(tmp_path / "other"), num_layers=2)
    assert (plain.rank, plain.alpha, plain.target_modules) == (
        *(other.rank, other.alpha, other.target_modules),
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"r: 8", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"r": "\xff"}', "not valid JSON"),
        (b'{"r": 8, "r": 16}', "'r' occurs twice"),
        (b'{"r": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"r": ' + b"9" * 100_000 + b"}", "not valid JSON"),
        (b'{"' + b"x" * 100_000 + b'": 1}', "is not supported"),
    ],
)
def test_config_that_is_no_sound_json_object_is_refused(
    raw: bytes, message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, CONFIG, seed=0)
    (tmp_path / "adapter_config.json").write_bytes(raw)
    error = refusal(tmp_path)
    assert message in str(error) and len(str(error)) < 500


def test_config_of_a_gigabyte_is_refused_unread(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, seed=0)
    os.truncate(tmp_path / "adapter_config.json", 1 << 30)  # sparse
    assert "at most" in str(refusal(tmp_path))


def test_nan_literal_in_the_file_is_refused_by_field(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": NaN, "r": 8}')
    assert refusal(tmp_path).field == "lora_alpha"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1e308, "r": 8}))
    assert read_peft_config(str(tmp_path), num_layers=2).alpha == 1e308
