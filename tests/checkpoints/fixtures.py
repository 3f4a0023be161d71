"""Writers of tiny Hugging Face and PEFT directories, independent of the readers under test.

`write_hf_model` and `write_adapter` return what they wrote, so that a test can compare without
reading files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from checkpoints.model_config import TARGET_MODULES, ModelConfig, RopeConfig

Array = NDArray[Any]

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ROPE_EXTRAS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def tiny_config(**changes: Any) -> ModelConfig:
    """A float32 Llama: 2 layers, hidden size 64, 4 query and 2 kv heads, vocabulary 128."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "dtype": "float32",
    }
    return ModelConfig(**(fields | changes))


def hf_config_dict(config: ModelConfig, *, transformers: int = 5) -> dict[str, Any]:
    """`config.json` of a model, in the spelling of transformers 4 or 5."""
    eos = list(config.eos_token_ids)
    found: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "dtype" if transformers == 5 else "torch_dtype": config.dtype,
    }
    if config.architecture != "LlamaForCausalLM":
        found["sliding_window"] = config.sliding_window
    if config.architecture.startswith("Qwen"):
        found["use_sliding_window"] = config.sliding_window is not None
        found["max_window_layers"] = 0
    return found | _rope_fields(config.rope, transformers)


def _rope_fields(rope: RopeConfig, transformers: int) -> dict[str, Any]:
    extras = {name: getattr(rope, name) for name in _ROPE_EXTRAS.get(rope.rope_type, ())}
    extras = {name: value for name, value in extras.items() if value is not None}
    if transformers == 5:
        return {"rope_parameters": {"rope_type": rope.rope_type, "rope_theta": rope.theta} | extras}
    scaling = None if rope.rope_type == "default" else {"type": rope.rope_type} | extras
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def make_weights(config: ModelConfig, seed: int) -> dict[str, Array]:
    """Random weights under their Hugging Face names, in `config.dtype`; linear: [out, in]."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(config.dtype) if config.dtype != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
    found: dict[str, Array] = {}

    def add(name: str, shape: tuple[int, ...], mean: float, spread: float) -> None:
        values = mean + spread * rng.standard_normal(shape, np.float32)
        found[name] = values.astype(dtype)

    hidden = config.hidden_size
    add("model.embed_tokens.weight", (config.vocab_size, hidden), 0.0, 1.0)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        add(prefix + "input_layernorm.weight", (hidden,), 1.0, 0.1)
        add(prefix + "post_attention_layernorm.weight", (hidden,), 1.0, 0.1)
        for module in TARGET_MODULES:
            size_in, size_out = config.module_shape(module)
            path = prefix + _parent(module) + module
            add(path + ".weight", (size_out, size_in), 0.0, size_in**-0.5)
            bias = {"o_proj": config.o_bias} | dict.fromkeys(
                ("q_proj", "k_proj", "v_proj"), config.qkv_bias
            )
            if bias.get(module, config.mlp_bias):
                add(path + ".bias", (size_out,), 0.0, 0.1)
        if config.qk_norm:
            add(prefix + "self_attn.q_norm.weight", (config.head_dim,), 1.0, 0.1)
            add(prefix + "self_attn.k_norm.weight", (config.head_dim,), 1.0, 0.1)
    add("model.norm.weight", (hidden,), 1.0, 0.1)
    if not config.tie_word_embeddings:
        add("lm_head.weight", (config.vocab_size, hidden), 0.0, hidden**-0.5)
    return found


def write_hf_model(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    seed: int,
    *,
    transformers: int = 5,
    num_shards: int = 1,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """Write config.json and safetensors (or shards with an index); return the weights."""
    directory = os.fspath(directory)
    os.makedirs(directory, exist_ok=True)
    weights = make_weights(config, seed)
    write_json(
        directory,
        "config.json",
        hf_config_dict(config, transformers=transformers) | dict(overrides or {}),
    )
    if num_shards == 1:
        save_file(weights, os.path.join(directory, "model.safetensors"))
        return weights
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: weights[name] for name in list(weights)[shard::num_shards]}
        save_file(part, os.path.join(directory, file))
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": weight_map,
    }
    write_json(directory, "model.safetensors.index.json", index)
    return weights


@dataclasses.dataclass(frozen=True)
class WrittenModule:
    """Arrays as stored, and their scaling: delta = scaling * b @ a."""

    a: Array  # [rank, in]
    b: Array  # [out, rank]
    scaling: float

    @property
    def delta(self) -> NDArray[np.float64]:
        """The update of the weight, [out, in], in float64."""
        delta: NDArray[np.float64] = self.scaling * (
            self.b.astype(np.float64) @ self.a.astype(np.float64)
        )
        return delta


def write_adapter(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    *,
    seed: int,
    ranks: int | Mapping[str, int] = 8,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    layers: Sequence[int] | None = None,
    alpha: float | Mapping[str, float] = 16,
    rslora: bool = False,
    dtype: str = "float32",
    magnitude: float = 1.0,
    prefix: str = "base_model.model.",
    infix: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> dict[tuple[int, str], WrittenModule]:
    """Write a PEFT directory; return every module written, by (layer, module).

    Args: ranks, alpha: one number, or one per module of `targets` (written as patterns).
          layers: written as layers_to_transform. magnitude: size of B; 1.0 moves logits plainly.
          infix: ".default" for raw state dicts. overrides: put into adapter_config.json last.
    """
    directory = os.fspath(directory)
    os.makedirs(directory, exist_ok=True)
    rng = np.random.default_rng(seed)
    stored = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    rank_of = {m: ranks if isinstance(ranks, int) else ranks[m] for m in targets}
    alpha_of = {m: alpha if isinstance(alpha, int | float) else alpha[m] for m in targets}
    written: dict[tuple[int, str], WrittenModule] = {}
    tensors: dict[str, Array] = {}
    for layer in range(config.num_layers) if layers is None else layers:
        for module in targets:
            size_in, size_out = config.module_shape(module)
            rank = rank_of[module]
            a = (rng.standard_normal((rank, size_in)) * size_in**-0.5).astype(stored)
            b = (rng.standard_normal((size_out, rank)) * magnitude / rank).astype(stored)
            scaling = alpha_of[module] / (math.sqrt(rank) if rslora else rank)
            written[layer, module] = WrittenModule(a, b, scaling)
            path = f"{prefix}model.layers.{layer}.{_parent(module)}{module}"
            tensors[f"{path}.lora_A{infix}.weight"] = a
            tensors[f"{path}.lora_B{infix}.weight"] = b
    save_file(tensors, os.path.join(directory, "adapter_model.safetensors"))
    rank, alpha_default = _most_common(rank_of), _most_common(alpha_of)
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": rank,
        "lora_alpha": alpha_default,
        "use_rslora": rslora,
        "use_dora": False,
        "target_modules": list(targets),
        "layers_to_transform": None if layers is None else list(layers),
        "rank_pattern": {m: r for m, r in rank_of.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alpha_of.items() if a != alpha_default},
    }
    write_json(directory, "adapter_config.json", fields | dict(overrides or {}))
    return written


def write_json(directory: str | os.PathLike[str], name: str, value: object) -> None:
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(value, file)


def _parent(module: str) -> str:
    return "mlp." if module in ("gate_proj", "up_proj", "down_proj") else "self_attn."


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
