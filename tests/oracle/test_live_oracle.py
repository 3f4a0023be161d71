"""Live comparison with transformers and PEFT where they are installed (`make test-oracle`).

The goldens are what these libraries still compute, and directories written by our own fixtures mean
to them what they mean to us.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints.hf_config import read_model_config
from checkpoints.model_config import TARGET_MODULES, RopeConfig
from checkpoints.peft_adapter import read_adapter
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model
from tests.oracle import numpy_llama
from tests.oracle.golden_files import MODELS, PROMPTS, GoldenModel, relative_error

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("default"),  # the libraries' own warnings are not ours to fix
]
TOLERANCE = 1e-4

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "llama-linear": {"rope": RopeConfig(rope_type="linear", factor=3.0)},
    "llama-yarn": {
        "rope": RopeConfig(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            mscale=0.7,
            mscale_all_dim=1.1,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        )
    },
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 5},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "qkv_bias": True, "sliding_window": 6},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "head_dim": 32},
}


def load_live(base: str, adapter: str | None) -> Any:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = importlib.import_module("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()


def run_live(model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    torch = importlib.import_module("torch")
    with torch.no_grad():
        output = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False)
    found: NDArray[np.float32] = output.logits[0].float().numpy()
    return found


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_recorded_logits_are_what_the_libraries_compute(model: GoldenModel) -> None:
    golden = model.arrays()
    for adapter in ("base", *model.adapters):
        loaded = load_live(model.base, None if adapter == "base" else model.adapter(adapter))
        for prompt in PROMPTS:
            got = run_live(loaded, golden[f"tokens.{prompt}"])
            assert relative_error(got, golden[f"logits.{adapter}.{prompt}"]) < TOLERANCE


@pytest.mark.parametrize("transformers_major", [4, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_directories_of_the_fixtures_mean_the_same_to_peft(
    name: str, transformers_major: int, tmp_path: Path
) -> None:
    config = tiny_config(**FAMILIES[name])
    weights = write_hf_model(
        tmp_path / "base", config, seed=3, transformers=transformers_major, num_shards=2
    )
    assert read_model_config(str(tmp_path / "base")) == config
    tokens = np.random.default_rng(5).integers(3, 128, 40).astype(np.int32)
    for seed, options in enumerate(_adapters()):
        path = tmp_path / f"adapter-{seed}"
        write_adapter(path, config, seed=seed, magnitude=0.2, **options)
        merged = numpy_llama.merge(read_adapter(str(path), config).modules)
        want = numpy_llama.logits(config, weights, tokens.tolist(), merged)
        got = run_live(load_live(str(tmp_path / "base"), str(path)), tokens)
        assert relative_error(got, want) < TOLERANCE


def _adapters() -> list[dict[str, Any]]:
    ranks = dict(zip(TARGET_MODULES, (4, 8, 16, 64, 8, 32, 5), strict=True))
    alphas = dict(zip(TARGET_MODULES, (4, 8, 16, 1, 8, 3, 5), strict=True))
    return [
        {"ranks": ranks, "alpha": alphas, "targets": TARGET_MODULES},
        {"ranks": ranks, "alpha": alphas, "targets": TARGET_MODULES[::2], "rslora": True},
        {"layers": [1], "targets": ["o_proj", "up_proj"], "dtype": "bfloat16"},
        {"targets": ["q_proj", "v_proj"], "overrides": {"alpha_pattern": {r"layers\.0\..*": 3}}},
    ]
