"""A sound adapter loads whole and as PEFT means it; its version names exactly what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.model_config import TARGET_MODULES
from checkpoints.peft_adapter import check_adapter, read_adapter
from tests.checkpoints.fixtures import tiny_config, write_adapter

CONFIG = tiny_config()
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("prefix", "infix"),
    [
        ("", ""),
        ("base_model.model.", ".default"),
        ("base_model.model.language_model.", ""),
        ("language_model.", ".default"),
    ],
)
def test_known_prefixes_load_as_the_same_version(prefix: str, infix: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "plain", CONFIG, seed=0)
    write_adapter(tmp_path / "other", CONFIG, seed=0, prefix=prefix, infix=infix)
    plain = read_adapter(str(tmp_path / "plain"), CONFIG)
    assert read_adapter(str(tmp_path / "other"), CONFIG).version == plain.version


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ({"targets": TARGET_MODULES}, {"target_modules": "all-linear"}),
        ({"targets": TARGET_MODULES}, {"target_modules": "All-Linear"}),
        ({}, {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"}),
        ({}, {"target_modules": None}),
        ({}, {"target_modules": ["self_attn.q_proj", "self_attn.v_proj"]}),
        ({}, {"exclude_modules": ["k_proj"], "target_modules": r".*\.[qkv]_proj"}),
        ({"layers": [1]}, {}),
        ({"layers": [1]}, {"layers_to_transform": 1, "layers_pattern": "layers"}),
        ({"layers": [1]}, {"layers_to_transform": [], "target_modules": r".*\.1\..*\.(q|v)_proj"}),
        (
            # A full path is not filtered by layers_to_transform: PEFT tests it first.
            {"layers": [0], "targets": ["q_proj"]},
            {"layers_to_transform": [1], "target_modules": ["model.layers.0.self_attn.q_proj"]},
        ),
    ],
)
def test_every_way_to_select_modules_is_understood(
    options: dict[str, Any], overrides: dict[str, Any], tmp_path: Path
) -> None:
    written = write_adapter(tmp_path, CONFIG, seed=0, overrides=overrides, **options)
    assert read_adapter(str(tmp_path), CONFIG).modules.keys() == written.keys()


def test_version_changes_with_whatever_changes_the_result(tmp_path: Path) -> None:
    def version(name: str, dtype: str | None = None, **options: Any) -> str:
        write_adapter(tmp_path / name, CONFIG, **({"seed": 0} | options))
        return read_adapter(str(tmp_path / name), CONFIG, dtype=dtype).version

    first = version("a")
    assert version("b") == first and len(first) == 64
    assert version("c", overrides={"lora_dropout": 0.5, "peft_version": "9"}) == first
    others = [
        version("d", seed=1),
        version("e", alpha=17),
        version("f", rslora=True),
        version("g", dtype="float16"),
        version("h", targets=["q_proj"]),
        version("i", layers=[0]),
        version("j", overrides={"alpha_pattern": {"q_proj": 3}}),
    ]
    write_adapter(tmp_path / "k", CONFIG, seed=0, dtype="bfloat16")
    others.append(read_adapter(str(tmp_path / "k"), CONFIG).version)
    assert len({first, *others}) == 9


def test_alpha_and_rank_patterns_follow_pefts_rule(tmp_path: Path) -> None:
    # First match in file order wins; a pattern matches whole path components at the end; else the
    # default.
    write_adapter(
        tmp_path,
        CONFIG,
        seed=0,
        ranks=8,
        targets=["q_proj", "v_proj", "down_proj"],
        overrides={
            "lora_alpha": 8,
            "alpha_pattern": {
                r"layers\.0\.self_attn\.(q|k)_proj": 80,
                "q_proj": 24,
                "proj": 1,  # no whole component
                "^down_proj": 1,  # anchored: the path does not start there
            },
        },
    )
    scalings = {k: m.scaling for k, m in read_adapter(str(tmp_path), CONFIG).modules.items()}
    assert scalings == {
        (0, "q_proj"): 10.0,
        (0, "v_proj"): 1.0,
        (0, "down_proj"): 1.0,
        (1, "q_proj"): 3.0,
        (1, "v_proj"): 1.0,
        (1, "down_proj"): 1.0,
    }


def test_defaults_of_a_minimal_config_are_pefts(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, seed=0, ranks=8)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    found = read_adapter(str(tmp_path), CONFIG)
    assert {module.scaling for module in found.modules.values()} == {1.0}
    assert found.base_model_name is None


def test_no_changed_byte_of_the_data_goes_unnoticed(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, seed=0, dtype="bfloat16")
    version = read_adapter(str(tmp_path), CONFIG).version
    sound = (tmp_path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(sound[:8], "little")
    rng = np.random.default_rng(0)
    for position in rng.integers(start, len(sound), 50):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / WEIGHTS).write_bytes(damaged)
        report = check_adapter(str(tmp_path), CONFIG)
        assert not report.is_sound or report.version != version
