"""What the fixtures write is what the readers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.hf_config import read_model_config
from checkpoints.hf_weights import open_weights
from checkpoints.model_config import TARGET_MODULES, RopeConfig
from checkpoints.peft_adapter import check_adapter, read_adapter
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model

_LLAMA3 = RopeConfig(rope_type="llama3", theta=5e5, factor=8.0, original_max_position_embeddings=64)
_YARN = RopeConfig(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.0, truncate=False
)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "llama-tied-bf16": {"tie_word_embeddings": True, "dtype": "bfloat16"},
    "llama3-rope": {"rope": _LLAMA3},
    "yarn-rope": {"rope": _YARN},
    "linear-rope": {"rope": RopeConfig(rope_type="linear", factor=2.0)},
    "dynamic-rope": {"rope": RopeConfig(rope_type="dynamic", factor=2.0)},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 7, "dtype": "float16"},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "qkv_bias": True, "rms_norm_eps": 1e-6},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "head_dim": 32},
    "qwen3-window": {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "sliding_window": 9},
}


@pytest.mark.parametrize("transformers", [4, 5])
@pytest.mark.parametrize("name", MODELS)
def test_model_read_equals_model_written(name: str, transformers: int, tmp_path: Path) -> None:
    config = tiny_config(**MODELS[name])
    written = write_hf_model(
        tmp_path, config, seed=0, transformers=transformers, num_shards=transformers - 3
    )
    assert read_model_config(str(tmp_path)) == config
    with open_weights(str(tmp_path), config) as weights:
        assert set(weights.names) == set(written)
        assert weights.num_bytes == sum(array.nbytes for array in written.values())
        for tensor, array in written.items():
            found = weights.read(tensor)
            assert found.dtype == array.dtype and found.shape == weights.shape(tensor)
            assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_read_equals_adapter_written(dtype: str, rslora: bool, tmp_path: Path) -> None:
    config = tiny_config()
    ranks = dict(zip(TARGET_MODULES, (4, 8, 16, 64, 8, 32, 5), strict=True))
    alphas = dict(zip(TARGET_MODULES, (4, 8, 16, 1.5, 8, -3, 5), strict=True))
    written = write_adapter(
        tmp_path,
        config,
        seed=1,
        ranks=ranks,
        alpha=alphas,
        targets=TARGET_MODULES,
        rslora=rslora,
        dtype=dtype,
    )
    found = read_adapter(str(tmp_path), config)
    assert list(found.modules) == list(written)
    assert found.max_rank == 64 and found.base_model_name == "tiny"
    for key, module in found.modules.items():
        np.testing.assert_array_equal(module.a, written[key].a)
        np.testing.assert_array_equal(module.b, written[key].b)
        assert module.a.dtype == written[key].a.dtype and module.a.flags.owndata
        assert module.scaling == written[key].scaling
        assert module.rank == ranks[key[1]]
    report = check_adapter(str(tmp_path), config)
    assert report.is_sound and report.version == found.version
    assert report.ranks == (4, 5, 8, 16, 32, 64) and report.modules == TARGET_MODULES
