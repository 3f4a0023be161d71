"""How the demo is trained: rows hold what they claim; what is exported is the trained stack."""

from __future__ import annotations

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy, and so safetensors, the bfloat16 dtype)
import numpy as np
import pytest
from safetensors.numpy import load_file

from bench.demo_adapters import PLANS
from bench.demo_data import (
    BOS_TOKEN_ID,
    EOS_TOKEN_ID,
    is_held_out,
    mixed_samples,
    pack,
    tag_token,
    task_samples,
)
from bench.demo_evaluate import accuracies
from bench.demo_export import adapter_tensors, write_model
from bench.demo_model import (
    DEMO_CONFIG,
    AdapterShape,
    Params,
    forward,
    init_adapters,
    init_params,
)
from checkpoints.demo import ADAPTERS_DIR, MODEL_DIR
from checkpoints.demo.tasks import BASE_TASK, TASKS, prompt
from checkpoints.model_config import TARGET_MODULES

ROW_LENGTH = 96


@pytest.fixture(scope="module")
def base_params() -> Params:
    stored = load_file(MODEL_DIR / "model.safetensors")
    return {name: jnp.asarray(array, jnp.float32) for name, array in stored.items()}


def test_a_new_model_has_the_tensors_of_the_committed_file(base_params: Params) -> None:
    new = jax.eval_shape(lambda: init_params(jax.random.key(0), DEMO_CONFIG))
    shapes = {name: array.shape for name, array in new.items()}
    tags = (len(TASKS), DEMO_CONFIG.hidden_size)  # rows that only training has
    embedding = base_params["model.embed_tokens.weight"]
    expected = {**base_params, "model.embed_tokens.weight": np.vstack([embedding, np.zeros(tags)])}
    assert shapes == {name: array.shape for name, array in expected.items()}


def test_packed_rows_unpack_to_the_samples_in_order() -> None:
    rows = pack(mixed_samples(random.Random(3)), 20, ROW_LENGTH)
    expected = mixed_samples(random.Random(3))
    for tokens, segments, in_answer in zip(rows.tokens, rows.segments, rows.in_answer, strict=True):
        assert segments.max() >= 1
        for segment in range(1, int(segments.max()) + 1):
            (places,) = np.nonzero(segments == segment)
            first, question, answer = next(expected)
            sample = [first, *question.encode(), *answer.encode(), EOS_TOKEN_ID]
            assert tokens[places[0] : places[-1] + 2].tolist() == sample
            (predicting,) = np.nonzero(in_answer & (segments == segment))
            assert tokens[predicting + 1].tolist() == [*answer.encode(), EOS_TOKEN_ID]


def test_no_training_text_is_a_held_out_text() -> None:
    for task_id in (BASE_TASK.id, "reverse"):
        for held_out in (False, True):
            samples = task_samples(random.Random(1), task_id, held_out=held_out)
            for _ in range(200):
                first, question, answer = next(samples)
                text = question.removesuffix(" =>")
                assert (first, question) == (BOS_TOKEN_ID, prompt(text))
                assert is_held_out(text) == held_out
                assert answer == (TASKS[task_id].answer(text) if task_id in TASKS else text)


def test_every_task_has_its_own_tag_outside_the_exported_vocabulary() -> None:
    tags = {tag_token(task_id) for task_id in TASKS}
    assert len(tags) == len(TASKS) and min(tags) == DEMO_CONFIG.vocab_size
    assert tag_token(BASE_TASK.id) == BOS_TOKEN_ID


def test_a_sample_is_predicted_alike_alone_and_packed(base_params: Params) -> None:
    packed = pack(task_samples(random.Random(2), "base"), 1, ROW_LENGTH)
    logits = forward(base_params, packed.tokens[:, :-1], packed.segments, config=DEMO_CONFIG)
    (places,) = np.nonzero(packed.segments[0] == 2)
    alone = packed.tokens[:, places]
    expected = forward(base_params, alone, np.ones_like(alone), config=DEMO_CONFIG)
    np.testing.assert_allclose(logits[:, places], expected, atol=1e-3, rtol=1e-4)


def test_ranks_beyond_an_adapters_own_change_nothing(base_params: Params) -> None:
    shapes = [
        AdapterShape(rank=4, alpha=8, modules=("q_proj", "down_proj"), layers=(1,)),
        AdapterShape(rank=16, alpha=8, modules=TARGET_MODULES, rank_pattern={"v_proj": 2}),
    ]
    lora, scales = init_adapters(jax.random.key(0), DEMO_CONFIG, shapes)
    lora = {
        name: array if "lora_A" in name else jax.random.normal(jax.random.key(1), array.shape)
        for name, array in lora.items()
    }
    tokens = np.arange(40, 60)[None]
    for index, shape in enumerate(shapes):
        merged = dict(base_params)
        for layer in range(DEMO_CONFIG.num_layers):
            for module in TARGET_MODULES:
                rank = shape.module_rank(layer, module)
                parent = "self_attn" if module in TARGET_MODULES[:4] else "mlp"
                name = f"model.layers.{layer}.{parent}.{module}"
                a = lora[name + ".lora_A.weight"][index, :rank]
                b = lora[name + ".lora_B.weight"][index, :, :rank]
                scaling = shape.alpha / rank if rank else 0.0
                merged[name + ".weight"] = base_params[name + ".weight"] + scaling * (b @ a)
        one, scale = jax.tree.map(lambda x, i=index: x[i], (lora, scales))
        segments = np.ones_like(tokens)
        got = forward(base_params, tokens, segments, config=DEMO_CONFIG, lora=one, scales=scale)
        expected = forward(merged, tokens, segments, config=DEMO_CONFIG)
        np.testing.assert_allclose(got, expected, atol=1e-3, rtol=1e-3)


def test_the_committed_files_are_what_the_exporter_writes(
    tmp_path: Path, base_params: Params
) -> None:
    stored = load_file(MODEL_DIR / "model.safetensors")
    write_model(tmp_path, stored, DEMO_CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in MODEL_DIR.iterdir()}
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / name).read_text() == (MODEL_DIR / name).read_text()
    lora, _ = init_adapters(jax.random.key(0), DEMO_CONFIG, [p.shape for p in PLANS.values()])
    for index, (adapter_id, plan) in enumerate(PLANS.items()):
        tensors = adapter_tensors(lora, index, plan, DEMO_CONFIG.num_layers)
        committed = load_file(ADAPTERS_DIR / adapter_id / "adapter_model.safetensors")
        assert {name: array.shape for name, array in tensors.items()} == {
            name: array.shape for name, array in committed.items()
        }


def test_the_base_repeats_held_out_texts(base_params: Params) -> None:
    assert accuracies(base_params, 40, tasks=(BASE_TASK.id,)) == {BASE_TASK.id: 1.0}
