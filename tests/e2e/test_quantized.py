"""Quantised weights: the model that they stand for, exactly; and one that still answers right."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints.demo import ADAPTERS_DIR, MODEL_DIR
from checkpoints.demo.tasks import BASE_TASK, TASKS, prompt, random_text
from checkpoints.hf_config import read_model_config
from checkpoints.model_config import TARGET_MODULES
from sloraj import Engine, SamplingParams, build
from sloraj.config import EngineConfig
from sloraj.convert import convert
from sloraj.errors import ConfigError
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model
from tests.e2e.driver import Driver, quiet
from tests.e2e.test_oracle import check_rows
from tests.oracle import numpy_llama
from tests.oracle.numpy_quantize import dequantized

KINDS = ("int8", "fp8")
# Of the logits, root mean square: int8 keeps a weight to about 1% of a row's typical size, fp8's
# 3 bits of mantissa keep each to 2.6% of itself.
ALLOWED_LOGITS_ERROR = {"int8": 0.015, "fp8": 0.04}


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("tp", [1, 2])
def test_logits_are_those_of_the_dequantised_model(
    quantization: str, tp: int, tmp_path: Path
) -> None:
    config = tiny_config(
        architecture="Qwen2ForCausalLM", num_kv_heads=2, qkv_bias=True, vocab_size=101
    )
    weights = dequantized(write_hf_model(tmp_path / "base", config, seed=3), quantization)
    merged: list[dict[Any, Any]] = [{}]
    for index, rank in enumerate((4, 16)):
        path = tmp_path / f"adapter{index}"
        modules = write_adapter(path, config, seed=index, ranks=rank, targets=TARGET_MODULES)
        merged.append(numpy_llama.merge(modules))
    paths = [str(tmp_path / f"adapter{index}") for index in range(2)]
    driver = Driver(str(tmp_path / "base"), paths, tp=tp, quantization=quantization)
    rng = random.Random(tp)
    rows = []
    for slot, deltas in enumerate(merged):
        tokens = [rng.randrange(config.vocab_size) for _ in range(rng.randint(10, 20))]
        rows.append((tokens, slot, numpy_llama.logits(config, weights, tokens, deltas)))
    check_rows(driver, rows, rng)


@pytest.mark.parametrize("quantization", KINDS)
def test_rounding_the_demo_models_weights_moves_its_logits_little(quantization: str) -> None:
    config = read_model_config(str(MODEL_DIR))
    weights = load_file(MODEL_DIR / "model.safetensors")
    rng = random.Random(0)
    for _ in range(4):
        text = random_text(rng)
        tokens = _tokenizer().encode(prompt(text) + BASE_TASK.answer(text)).ids
        want = numpy_llama.logits(config, weights, tokens)
        got = numpy_llama.logits(config, dequantized(weights, quantization), tokens)
        error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
        assert 0 < error < ALLOWED_LOGITS_ERROR[quantization], error


def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.mark.parametrize("quantization", KINDS)
def test_the_demo_answers_right_as_base_and_as_every_adapter(quantization: str) -> None:
    text = random_text(random.Random(5))
    with Engine(
        str(MODEL_DIR), adapters={name: ADAPTERS_DIR / name for name in TASKS},
        quantization=quantization, max_num_seqs=1, max_num_batched_tokens=32, pool_bytes=2**25,
    ) as engine:  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=60)
        assert engine.info.quantization == quantization
        answers = engine.generate(prompt(text), params, adapter=[None, *TASKS])
    tasks = [BASE_TASK, *TASKS.values()]
    assert [a.text for a in answers] == [task.answer(text) for task in tasks]


def settings(model: Path, quantization: str | None) -> EngineConfig:
    return EngineConfig(
        model=str(model), quantization=quantization, max_num_seqs=1, max_num_batched_tokens=16,
        max_rank=4,
    )  # fmt: skip


def test_a_converted_checkpoint_is_quantised_like_its_original(tmp_path: Path) -> None:
    config = tiny_config()
    write_hf_model(tmp_path / "base", config, seed=1)
    convert(str(tmp_path / "base"), str(tmp_path / "converted"))
    mesh = build.make_mesh(1)
    for quantization in KINDS:
        loaded = []
        for name in ("base", "converted"):
            resolved = build.resolve(settings(tmp_path / name, quantization), "cpu")
            loaded.append(build._load(resolved, config, mesh, quiet)[1])
        for original, converted in zip(*loaded, strict=True):
            assert original.keys() == converted.keys()
            for name, leaf in original.items():
                assert leaf.dtype == converted[name].dtype
                assert np.asarray(leaf).tobytes() == np.asarray(converted[name]).tobytes(), name


def test_the_memory_plan_counts_the_bytes_of_quantised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    write_hf_model(tmp_path, config, seed=1)
    seen = []

    class Planned(Exception):
        pass

    def record(layout: Any, **sizes: Any) -> Any:
        seen.append(sizes["in_use_bytes"])
        raise Planned

    monkeypatch.setattr(build, "plan_memory", record)
    for quantization in (None, "int8"):
        with pytest.raises(Planned):
            build.build_core(settings(tmp_path, quantization), quiet)
    d, f, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    qkv = q + 2 * config.num_kv_heads * config.head_dim
    elements = qkv * d + d * q + 2 * f * d + d * f
    saved = 3 * elements - 4 * (qkv + d + 2 * f + d)  # float32 to one byte, less the scales
    assert seen[0] - seen[1] == config.num_layers * saved


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization: got 'int4', allowed: 'int8', 'fp8'"):
        EngineConfig(model="m", quantization="int4")
