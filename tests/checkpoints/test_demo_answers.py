"""The embedded demo's model does what `tasks.py` says, for the base and for every adapter.

The forward pass here is a separate one, in numpy: it reads the committed files alone, with PEFT's
rules written out again.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy, and so safetensors, the bfloat16 dtype)
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from checkpoints.demo import ADAPTERS_DIR, MODEL_DIR
from checkpoints.demo.tasks import BASE_TASK, MAX_ANSWER_LENGTH, TASKS, Task, prompt, random_text


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    assert isinstance(value, dict)
    return value


CONFIG = read_json(MODEL_DIR / "config.json")
EOS_TOKEN_ID = CONFIG["eos_token_id"]


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in load_file(path).items()}


@pytest.fixture(scope="module")
def base_weights() -> dict[str, np.ndarray]:
    return load_tensors(MODEL_DIR / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


# The oracle: PEFT's merge rule, then a Llama in numpy.


def merged(base: dict[str, np.ndarray], adapter: Path) -> dict[str, np.ndarray]:
    """Base weights with W + scaling * B A in place of W, the scaling as the config gives it."""
    config = read_json(adapter / "adapter_config.json")
    tensors = load_tensors(adapter / "adapter_model.safetensors")
    weights = dict(base)
    for name, lora_a in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = config["rank_pattern"].get(module.rsplit(".", 1)[-1], config["r"])
        assert lora_a.shape[0] == rank
        scaling = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
        lora_b = tensors[name.replace(".lora_A.", ".lora_B.")]
        weights[module + ".weight"] = base[module + ".weight"] + scaling * (lora_b @ lora_a)
    return weights


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG["rms_norm_eps"]) * weight


def rotate(x: np.ndarray) -> np.ndarray:
    """Rotary embedding of x [S, heads, H]; positions are 0..S-1."""
    half = x.shape[-1] // 2
    theta = CONFIG["rope_parameters"]["rope_theta"]
    turns = np.exp(1j * np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half))
    pairs = (x[..., :half] + 1j * x[..., half:]) * turns[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1).astype(np.float32)


def likeliest(weights: dict[str, np.ndarray], tokens: list[int]) -> list[int]:
    """The most likely next token after each of `tokens` (a causal pass over them)."""
    heads, kv_heads, width = (
        CONFIG[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    x = weights["model.embed_tokens.weight"][tokens]
    length = len(tokens)
    hidden = np.triu(np.full((length, length), -np.inf, np.float32), 1)
    for layer in range(CONFIG["num_hidden_layers"]):
        w = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): array
            for name, array in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        h = rms_norm(x, w["input_layernorm"])
        q, k, v = (
            (h @ w[f"self_attn.{m}_proj"].T).reshape(length, -1, width) for m in ("q", "k", "v")
        )
        k, v = (np.repeat(y, heads // kv_heads, axis=1) for y in (rotate(k), v))
        scores = np.einsum("qnh,knh->nqk", rotate(q), k) / width**0.5 + hidden
        weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        x = x + np.einsum("nqk,knh->qnh", weight, v).reshape(length, -1) @ w["self_attn.o_proj"].T
        h = rms_norm(x, w["post_attention_layernorm"])
        gate, up = h @ w["mlp.gate_proj"].T, h @ w["mlp.up_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj"].T
    logits = rms_norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    return [int(token) for token in np.argmax(logits, axis=-1)]


def greedy_answer(weights: dict[str, np.ndarray], tokenizer: Tokenizer, text: str) -> str:
    tokens = tokenizer.encode(prompt(text)).ids
    start = len(tokens)
    while (token := likeliest(weights, tokens)[-1]) != EOS_TOKEN_ID:
        tokens.append(token)
        assert len(tokens) <= start + MAX_ANSWER_LENGTH + 1, tokenizer.decode(tokens[start:])
    return str(tokenizer.decode(tokens[start:]))


def weights_of(task: Task, base_weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if task is BASE_TASK:
        return base_weights
    return merged(base_weights, ADAPTERS_DIR / task.id)


def task_id(task: Task) -> str:
    return task.id


# Laws.


@pytest.mark.parametrize(
    "task", [BASE_TASK, TASKS["shift-3"], TASKS["drop-vowels"], TASKS["quote"]]
)
def test_greedy_decoding_gives_the_tasks_answer(
    task: Task, base_weights: dict[str, np.ndarray], tokenizer: Tokenizer
) -> None:
    weights = weights_of(task, base_weights)
    for text in ("hello world", "Llama 42"):
        assert greedy_answer(weights, tokenizer, text) == task.answer(text)


@pytest.mark.parametrize("task", [BASE_TASK, *TASKS.values()], ids=task_id)
def test_every_token_of_the_right_answer_is_the_likeliest(
    task: Task, base_weights: dict[str, np.ndarray], tokenizer: Tokenizer
) -> None:
    weights = weights_of(task, base_weights)
    rng = random.Random(11)
    for text in ("Attack at dawn 7", random_text(rng)):
        question = tokenizer.encode(prompt(text)).ids
        answer = [*task.answer(text).encode(), EOS_TOKEN_ID]
        tokens = likeliest(weights, question + answer[:-1])
        assert tokens[len(question) - 1 :] == answer, tokenizer.decode(tokens[len(question) - 1 :])


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")  # the libraries' own warnings are not ours to fix
def test_transformers_and_peft_load_every_adapter_and_answer_rightly() -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    wrapped = None
    for adapter_id, task in TASKS.items():
        path = ADAPTERS_DIR / adapter_id
        name = f"demo-{adapter_id}"  # PEFT makes it a torch attribute: "double" alone would clash
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(base, path, adapter_name=name)
        else:
            loaded = wrapped.load_adapter(path, adapter_name=name)
            assert not loaded.missing_keys or all("lora" not in k for k in loaded.missing_keys)
            assert not loaded.unexpected_keys
        wrapped.set_adapter(name)
        for text in ("hello world", "Llama 42"):
            ids = tokenizer(prompt(text), return_tensors="pt").input_ids
            out = wrapped.generate(input_ids=ids, max_new_tokens=64, do_sample=False)
            answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert answer == task.answer(text), (adapter_id, answer)
