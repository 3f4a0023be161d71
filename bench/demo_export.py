"""Writes the demo model and adapters as Hugging Face and PEFT directories.

Files, names and keys are those that `save_pretrained` of either library writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from bench.demo_adapters import AdapterPlan
from bench.demo_data import BOS_TOKEN_ID, EOS_TOKEN_ID, VOCAB_SIZE
from bench.demo_model import module_name
from checkpoints.model_config import TARGET_MODULES, ModelConfig

Arrays = dict[str, np.ndarray]

_METADATA = {"format": "pt"}  # what transformers and PEFT write and expect

# The answer follows the last message; earlier ones do not matter to this model.
CHAT_TEMPLATE = """\
{%- set content = messages[-1]['content'] -%}
{%- if content is not string -%}
{%- set texts = content | selectattr('type', 'equalto', 'text') -%}
{%- set content = texts | map(attribute='text') | join('') -%}
{%- endif -%}
{{- bos_token + content | trim + ' =>' -}}
"""


def to_bfloat16(arrays: dict[str, Any]) -> Arrays:
    """Round to bfloat16, the stored dtype, to nearest even."""
    return {name: np.asarray(array).astype(ml_dtypes.bfloat16) for name, array in arrays.items()}


def byte_tokenizer() -> Tokenizer:
    """One token a byte (id = byte value), then <bos> and <eos>; encoding puts <bos> first."""
    characters = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)]
    )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS_TOKEN_ID)]
            ),
        ]
    )
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write_model(directory: Path, params: Arrays, config: ModelConfig) -> None:
    """Write weights, config, tokenizer and chat template.

    `params` are bf16 under HF names; the embeddings of the tags are left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    embedding = params["model.embed_tokens.weight"][:VOCAB_SIZE]
    tensors = {**params, "model.embed_tokens.weight": np.ascontiguousarray(embedding)}
    save_file(dict(sorted(tensors.items())), directory / "model.safetensors", _METADATA)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    _write_json(directory / "special_tokens_map.json", special)
    _write_json(
        directory / "tokenizer_config.json",
        {
            **special,
            "added_tokens_decoder": {
                str(token_id): {
                    "content": content,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token_id, content in ((BOS_TOKEN_ID, "<bos>"), (EOS_TOKEN_ID, "<eos>"))
            },
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    ids = {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID}
    _write_json(directory / "generation_config.json", {"_from_model_config": True, **ids})
    _write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            **ids,
            "dtype": "bfloat16",
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": config.num_heads,
            "num_hidden_layers": config.num_layers,
            "num_key_value_heads": config.num_kv_heads,
            "pad_token_id": None,
            "pretraining_tp": 1,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": {"rope_theta": config.rope.theta, "rope_type": "default"},
            "tie_word_embeddings": False,
            "transformers_version": "5.0.0",
            "use_cache": True,
            "vocab_size": config.vocab_size,
        },
    )


def adapter_tensors(stacked: dict[str, Any], index: int, plan: AdapterPlan, layers: int) -> Arrays:
    """Adapter `index` of the trained stack, cut to its ranks, in bf16 under PEFT's names."""
    tensors: Arrays = {}
    for layer in range(layers):
        for module in TARGET_MODULES:
            name = module_name(layer, module)
            if rank := plan.shape.module_rank(layer, module):
                a = np.asarray(stacked[name + ".lora_A.weight"][index])[:rank]
                b = np.asarray(stacked[name + ".lora_B.weight"][index])[:, :rank]
                tensors[f"base_model.model.{name}.lora_A.weight"] = a
                tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b)
    return to_bfloat16(tensors)


def write_adapter(directory: Path, tensors: Arrays, plan: AdapterPlan) -> None:
    """Write one PEFT directory: `adapter_config.json` and `adapter_model.safetensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), directory / "adapter_model.safetensors", _METADATA)
    shape, spelled = plan.shape, plan.target_modules
    _write_json(
        directory / "adapter_config.json",
        {
            "alora_invocation_tokens": None,
            "alpha_pattern": {},
            "arrow_config": None,
            "auto_mapping": None,
            "base_model_name_or_path": "checkpoints/demo/model",
            "bias": "none",
            "corda_config": None,
            "ensure_weight_tying": False,
            "eva_config": None,
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layer_replication": None,
            "layers_pattern": None,
            "layers_to_transform": None if shape.layers is None else list(shape.layers),
            "loftq_config": {},
            "lora_alpha": shape.alpha,
            "lora_bias": False,
            "lora_dropout": 0.0,
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "modules_to_save": None,
            "peft_type": "LORA",
            "peft_version": "0.18.0",
            "qalora_group_size": 16,
            "r": shape.rank,
            "rank_pattern": shape.rank_pattern,
            "revision": None,
            "target_modules": spelled if isinstance(spelled, str) else list(spelled),
            "target_parameters": None,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": None,
            "use_dora": False,
            "use_qalora": False,
            "use_rslora": shape.use_rslora,
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
