"""The embedded demo's files: ordinary HF and PEFT directories, small and mixed; and its tasks."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2.sandbox
import ml_dtypes  # noqa: F401  (gives numpy, and so safetensors, the bfloat16 dtype)
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from checkpoints.demo import ADAPTERS_DIR, MODEL_DIR
from checkpoints.demo.tasks import (
    ALPHABET,
    BASE_TASK,
    MAX_ANSWER_LENGTH,
    MAX_TEXT_LENGTH,
    TASKS,
    prompt,
    random_text,
)

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXAMPLES = {  # by hand
    "shift-1": ("Abz 9!", "Bca 9!"),
    "shift-3": ("hello world", "khoor zruog"),
    "shift-13": ("Hello", "Uryyb"),
    "shift-25": ("bcd A", "abc Z"),
    "atbash": ("abc XYZ", "zyx CBA"),
    "upper": ("hello World 7", "HELLO WORLD 7"),
    "lower": ("Hello WORLD", "hello world"),
    "swapcase": ("Hello", "hELLO"),
    "title": ("hELLO world", "Hello World"),
    "pascal": ("hello wORLD", "HelloWorld"),
    "snake": ("a bc d", "a_bc_d"),
    "kebab": ("a bc d", "a-bc-d"),
    "join": ("a bc d", "abcd"),
    "exclaim": ("oh no", "oh! no!"),
    "quote": ("oh no", '"oh no"'),
    "brackets": ("oh no", "[oh] [no]"),
    "star-vowels": ("Oh hello", "*h h*ll*"),
    "drop-vowels": ("Oh hello", "h hll"),
    "hash-digits": ("a1 22", "a# ##"),
    "mask": ("Oh no 2!", "xx xx 2!"),
    "leet": ("a Test is", "4 7357 15"),
    "double": ("ab c", "aabb  cc"),
    "spell": ("abc d", "a-b-c- -d"),
    "initials": ("hello big world", "hbw"),
    "first-word": ("hello big world", "hello"),
    "last-word": ("hello big world", "world"),
    "stutter": ("oh no", "o-oh n-no"),
    "reverse": ("abc de", "ed cba"),
    "reverse-words": ("abc de", "cba ed"),
}


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    assert isinstance(value, dict)
    return value


CONFIG = read_json(MODEL_DIR / "config.json")


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    tensors = load_file(path)
    assert {array.dtype.name for array in tensors.values()} == {"bfloat16"}
    return {name: array.astype(np.float32) for name, array in tensors.items()}


@pytest.fixture(scope="module")
def base_weights() -> dict[str, np.ndarray]:
    return load_tensors(MODEL_DIR / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.mark.parametrize("task_id", EXAMPLES)
def test_tasks_answer_as_worked_out_by_hand(task_id: str) -> None:
    text, answer = EXAMPLES[task_id]
    assert TASKS[task_id].answer(text) == answer


def test_every_task_but_the_shifts_has_an_example_and_every_adapter_a_task() -> None:
    assert {task for task in TASKS if not task.startswith("shift-")} <= set(EXAMPLES)
    assert {path.name for path in ADAPTERS_DIR.iterdir()} == set(TASKS)
    assert len(TASKS) >= 32
    assert BASE_TASK.answer("Hello  World") == "Hello  World"


def test_random_texts_keep_to_the_stated_form() -> None:
    rng = random.Random(5)
    for _ in range(2_000):
        text = random_text(rng)
        assert 1 <= len(text) <= MAX_TEXT_LENGTH and set(text) <= set(ALPHABET)
        assert text == text.strip(" ") and "  " not in text
        assert max(len(task.answer(text)) for task in TASKS.values()) <= MAX_ANSWER_LENGTH


def test_the_demo_is_at_most_8_megabytes() -> None:
    files = [path for path in MODEL_DIR.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") <= 8_000_000


def test_ranks_scalings_and_target_modules_are_mixed() -> None:
    configs = [read_json(path / "adapter_config.json") for path in ADAPTERS_DIR.iterdir()]
    assert {config["r"] for config in configs} >= {4, 6, 8, 12, 16, 24, 32, 64}
    assert len({config["lora_alpha"] / config["r"] for config in configs}) >= 4
    assert sum(config["use_rslora"] for config in configs) >= 2
    assert any(config["rank_pattern"] for config in configs)
    assert any(config["layers_to_transform"] for config in configs)
    spelled = [config["target_modules"] for config in configs]
    assert "all-linear" in spelled
    assert any(isinstance(modules, str) and modules != "all-linear" for modules in spelled)
    lists = {tuple(modules) for modules in spelled if isinstance(modules, list)}
    assert lists >= {("q_proj", "v_proj"), MODULES[:4], MODULES[4:], MODULES}


def targeted(config: dict[str, Any]) -> Iterator[str]:
    """Module names that an adapter's config selects, by PEFT's rules."""
    spelled, layers = config["target_modules"], config["layers_to_transform"]
    for layer in range(CONFIG["num_hidden_layers"]):
        for module in MODULES:
            parent = "self_attn" if module in MODULES[:4] else "mlp"
            name = f"model.layers.{layer}.{parent}.{module}"
            if isinstance(spelled, list):
                selected = module in spelled and (layers is None or layer in layers)
            else:
                selected = spelled == "all-linear" or re.fullmatch(spelled, name) is not None
            if selected:
                yield name


@pytest.mark.parametrize("adapter_id", TASKS)
def test_an_adapter_holds_exactly_the_tensors_its_config_selects(
    adapter_id: str, base_weights: dict[str, np.ndarray]
) -> None:
    directory = ADAPTERS_DIR / adapter_id
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = read_json(directory / "adapter_config.json")
    assert (config["peft_type"], config["task_type"], config["bias"]) == (
        "LORA",
        "CAUSAL_LM",
        "none",
    )
    expected = {}
    for name in targeted(config):
        size_out, size_in = base_weights[name + ".weight"].shape
        rank = config["rank_pattern"].get(name.rsplit(".", 1)[-1], config["r"])
        expected[f"base_model.model.{name}.lora_A.weight"] = (rank, size_in)
        expected[f"base_model.model.{name}.lora_B.weight"] = (size_out, rank)
    tensors = load_tensors(directory / "adapter_model.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == expected
    assert all(np.isfinite(array).all() for array in tensors.values())


def test_the_config_describes_the_weights(base_weights: dict[str, np.ndarray]) -> None:
    assert CONFIG["architectures"] == ["LlamaForCausalLM"] and CONFIG["dtype"] == "bfloat16"
    assert CONFIG["num_attention_heads"] > CONFIG["num_key_value_heads"]
    assert base_weights["lm_head.weight"].shape == (CONFIG["vocab_size"], CONFIG["hidden_size"])
    assert sum(array.size for array in base_weights.values()) <= 2_500_000


def test_transformers_reads_config_and_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(MODEL_DIR)
    assert config.rope_parameters == CONFIG["rope_parameters"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    assert tokenizer("a =>").input_ids == [256, *b"a =>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    chat = [{"role": "user", "content": "hello world"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<bos>" + prompt("hello world")


def test_the_tokenizer_maps_every_byte_to_its_value(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0x20, 0x250))) + "\n\t <eo> naïve 日本 🙂  two"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<eos>", add_special_tokens=False).ids == [257]
    assert tokenizer.get_vocab_size() == 258 <= CONFIG["vocab_size"]


@pytest.mark.parametrize(
    "content", ["hello world", [{"type": "text", "text": "hello world"}], " hello world\n"]
)
def test_the_chat_template_renders_the_prompt(content: Any, tokenizer: Tokenizer) -> None:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    template = environment.from_string((MODEL_DIR / "chat_template.jinja").read_text())
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": content}]
    rendered = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    assert rendered == "<bos>" + prompt("hello world")
    ids = tokenizer.encode(rendered, add_special_tokens=False).ids
    assert ids == tokenizer.encode(prompt("hello world")).ids


def test_every_recorded_accuracy_is_at_least_99_percent() -> None:
    report = read_json(MODEL_DIR.parent / "accuracy.json")
    assert report["held_out_texts"] >= 1_000
    for column in ("exact_match_float32", "exact_match_bfloat16"):
        assert set(report[column]) == {BASE_TASK.id, *TASKS}
        assert min(report[column].values()) >= 0.99


def test_the_readme_gives_the_recorded_accuracy_and_shape_of_every_adapter() -> None:
    report = read_json(MODEL_DIR.parent / "accuracy.json")
    rows = {
        cells[1].strip("() "): [cell.strip() for cell in cells]
        for line in (MODEL_DIR.parent / "README.md").read_text().splitlines()
        if line.endswith("% |") and (cells := re.split(r"(?<!\\)\|", line))
    }
    assert set(rows) == {BASE_TASK.id, *TASKS}
    for task_id, cells in rows.items():
        columns = (report["exact_match_float32"], report["exact_match_bfloat16"])
        assert cells[-3:-1] == [f"{100 * column[task_id]:.2f} %" for column in columns]
        task = BASE_TASK if task_id == BASE_TASK.id else TASKS[task_id]
        assert cells[2:4] == [task.description, f"`{task.answer('Hello World 42')}`"]
        if task_id in TASKS:
            config = read_json(ADAPTERS_DIR / task_id / "adapter_config.json")
            assert cells[4:6] == [str(config["r"]), str(config["lora_alpha"])]
