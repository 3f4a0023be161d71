"""The numpy oracle, fed by our readers, agrees with transformers and PEFT."""

from __future__ import annotations

import numpy as np
import pytest

from checkpoints.hf_config import read_model_config
from checkpoints.hf_weights import open_weights
from checkpoints.peft_adapter import read_adapter
from tests.oracle import numpy_llama
from tests.oracle.golden_files import MODELS, PROMPTS, GoldenModel, relative_error

TOLERANCE = 1e-4  # float32 recording against float64
CASES = [(model, adapter) for model in MODELS for adapter in ("base", *model.adapters)]


@pytest.mark.row(32)
@pytest.mark.parametrize(
    ("model", "adapter"), CASES, ids=lambda value: getattr(value, "name", value)
)
def test_numpy_model_agrees_with_the_recorded_logits(model: GoldenModel, adapter: str) -> None:
    config = read_model_config(model.base)
    modules = {} if adapter == "base" else read_adapter(model.adapter(adapter), config).modules
    golden = model.arrays()
    with open_weights(model.base, config) as weights:
        tensors = {name: weights.read(name) for name in weights.names}
        for prompt in PROMPTS:
            got = numpy_llama.logits(
                config, tensors, golden[f"tokens.{prompt}"].tolist(), numpy_llama.merge(modules)
            )
            assert relative_error(got, golden[f"logits.{adapter}.{prompt}"]) < TOLERANCE


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_recorded_adapter_moves_the_logits(model: GoldenModel) -> None:
    # Otherwise the agreement above would say nothing about adapters.
    golden = model.arrays()
    for adapter in model.adapters:
        for prompt in PROMPTS:
            moved = relative_error(
                golden[f"logits.{adapter}.{prompt}"], golden[f"logits.base.{prompt}"]
            )
            assert moved > 100 * TOLERANCE


def test_golden_set_covers_every_architecture_and_rope_type() -> None:
    configs = [read_model_config(model.base) for model in MODELS]
    assert {c.architecture for c in configs} == {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
    assert {c.rope.rope_type for c in configs} == {
        *("default", "linear", "dynamic", "yarn", "llama3")
    }
    assert any(c.num_kv_heads == c.num_heads for c in configs)
    assert any(c.num_kv_heads < c.num_heads for c in configs)
    assert any(c.sliding_window for c in configs) and any(c.tie_word_embeddings for c in configs)


def test_greedy_extends_by_the_largest_logit() -> None:
    model = MODELS[0]
    config = read_model_config(model.base)
    with open_weights(model.base, config) as weights:
        tensors = {name: weights.read(name) for name in weights.names}
        tokens = numpy_llama.greedy(config, tensors, [5, 6, 7], 3)
        whole = numpy_llama.logits(config, tensors, [5, 6, 7, *tokens])
    assert tokens == np.argmax(whole, axis=-1)[2:5].tolist()
