"""Every spelling of a model config gives the same values; what would change the result is honoured
or refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.errors import (
    CheckpointError,
    CheckpointNotFound,
    InvalidCheckpoint,
    UnsupportedCheckpoint,
)
from checkpoints.hf_config import read_generation_defaults, read_model_config
from checkpoints.model_config import ModelConfig, RopeConfig
from tests.checkpoints.fixtures import hf_config_dict, tiny_config, write_adapter, write_json

# As published, shortened to what is read.
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_3_1_8B = LLAMA_2_7B | {
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def read(path: Path, fields: dict[str, Any]) -> ModelConfig:
    write_json(path, "config.json", fields)
    return read_model_config(str(path))


def refusal(path: Path, fields: dict[str, Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(path, fields)
    return caught.value


def tiny(**changes: Any) -> dict[str, Any]:
    return hf_config_dict(tiny_config()) | changes


def qwen(**changes: Any) -> dict[str, Any]:
    return hf_config_dict(tiny_config(architecture="Qwen2ForCausalLM")) | changes


def test_published_configs_are_read_as_published(tmp_path: Path) -> None:
    llama_2 = read(tmp_path, LLAMA_2_7B)
    assert (llama_2.head_dim, llama_2.num_kv_heads, llama_2.dtype) == (128, 32, "float16")
    assert llama_2.rope == RopeConfig() and llama_2.eos_token_ids == (2,)
    llama_3 = read(tmp_path, LLAMA_3_1_8B)
    assert llama_3.rope == RopeConfig(
        rope_type="llama3", theta=5e5, factor=8.0, original_max_position_embeddings=8192
    )
    assert llama_3.eos_token_ids == (128001, 128008, 128009)
    qwen_2 = read(tmp_path, QWEN2_7B)
    assert (qwen_2.qkv_bias, qwen_2.o_bias, qwen_2.qk_norm) == (True, False, False)
    assert qwen_2.sliding_window is None and qwen_2.rope.theta == 1e6


def test_both_spellings_of_rope_mean_the_same(tmp_path: Path) -> None:
    scaling = LLAMA_3_1_8B["rope_scaling"]
    assert isinstance(scaling, dict)
    old = read(tmp_path, LLAMA_3_1_8B)
    rest = {k: v for k, v in LLAMA_3_1_8B.items() if k not in ("rope_scaling", "rope_theta")}
    flat = scaling | {"rope_theta": 500000.0}
    assert read(tmp_path, rest | {"rope_parameters": flat}) == old
    assert read(tmp_path, rest | {"rope_parameters": {"full_attention": flat}}) == old
    both = {"full_attention": flat, "sliding_attention": flat}
    assert read(tmp_path, rest | {"rope_parameters": both}) == old
    by_type = {k: v for k, v in scaling.items() if k != "rope_type"} | {"type": "llama3"}
    assert read(tmp_path, LLAMA_3_1_8B | {"rope_scaling": by_type}) == old


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "su"}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {}}},
            "rope_parameters",
        ),
        ({"rope_parameters": {"full_attention": {}, "rope_theta": 5.0}}, "rope_parameters"),
    ],
)
def test_rope_that_is_not_supported_is_refused_by_name(
    rope: dict[str, Any], field: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, LLAMA_2_7B | rope)
    assert isinstance(error, UnsupportedCheckpoint) and error.field == field


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "high_freq_factor",
        ),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "rope_theta"),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 3.0},
            },
            "rope_scaling",
        ),
    ],
)
def test_rope_that_contradicts_itself_is_refused_by_name(
    rope: dict[str, Any], field: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, LLAMA_2_7B | rope)
    assert isinstance(error, InvalidCheckpoint) and error.field == field


def test_length_before_scaling_falls_back_to_the_models(tmp_path: Path) -> None:
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert read(tmp_path, LLAMA_2_7B | yarn).rope.original_max_position_embeddings == 4096
    outer = yarn | {"original_max_position_embeddings": 1024}
    assert read(tmp_path, LLAMA_2_7B | outer).rope.original_max_position_embeddings == 1024


def test_defaults_of_absent_fields_are_those_of_the_class(tmp_path: Path) -> None:
    def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
        return {k: v for k, v in fields.items() if k not in names}

    llama = read(tmp_path, without(tiny(), "num_key_value_heads", "head_dim", "rms_norm_eps"))
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps) == (4, 16, 1e-6)
    assert read(tmp_path, tiny(num_key_value_heads=None)).num_kv_heads == 4
    mistral = hf_config_dict(tiny_config(architecture="MistralForCausalLM"))
    assert read(tmp_path, without(mistral, "sliding_window")).sliding_window == 4096
    assert read(tmp_path, mistral).sliding_window is None  # null is not absent
    qwen_3 = hf_config_dict(tiny_config(architecture="Qwen3ForCausalLM"))
    assert read(tmp_path, without(qwen_3, "head_dim")).head_dim == 128
    bare = read(tmp_path, without(tiny(), "dtype", "eos_token_id", "bos_token_id", "architectures"))
    assert (bare.dtype, bare.eos_token_ids, bare.bos_token_id) == ("float32", (2,), 1)
    bare_qwen = read(tmp_path, without(qwen(), "eos_token_id", "bos_token_id"))
    assert (bare_qwen.eos_token_ids, bare_qwen.bos_token_id) == ((), None)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 8}, None),
        ({"use_sliding_window": True, "sliding_window": None}, None),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention"] * 2,
            },
            None,
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention"] * 2,
            },
            8,
        ),
    ],
)
def test_window_of_qwen_follows_all_its_switches(
    fields: dict[str, Any], window: int | None, tmp_path: Path
) -> None:
    assert read(tmp_path, qwen(**fields)).sliding_window == window


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (qwen(use_sliding_window=True, sliding_window=8, max_window_layers=1), "max_window_layers"),
        (
            qwen(
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["full_attention", "sliding_attention"],
            ),
            "layer_types",
        ),
        (tiny(sliding_window=8), "sliding_window"),
        (tiny(layer_types=["sliding_attention"] * 2), "layer_types"),
        (tiny(layer_types=["full_attention"] * 3), "layer_types"),
        (tiny(layer_types=[{}, []]), "layer_types"),
        (tiny(layer_types=5), "layer_types"),
        (tiny(architectures=["GemmaForCausalLM"]), "architectures"),
        (tiny(architectures=["LlamaForCausalLM"] * 2), "architectures"),
        (tiny(architectures=[{}]), "architectures"),
        (tiny(architectures=None, model_type="gpt2"), "model_type"),
        (tiny(hidden_act="gelu"), "hidden_act"),
        (tiny(dtype="float8_e4m3fn"), "dtype"),
        (tiny(quantization_config={"bits": 4}), "quantization_config"),
        (tiny(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (tiny(logit_scale=0.5), "logit_scale"),
        (tiny(num_experts=8), "num_experts"),
        (tiny(no_rope_layers=[0, 1]), "no_rope_layers"),
    ],
)
def test_field_that_is_not_supported_is_refused_by_name(
    fields: dict[str, Any], field: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, fields)
    assert isinstance(error, UnsupportedCheckpoint) and error.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": 66, "head_dim": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id"),
        ({"model_type": "mistral"}, "model_type"),
    ],
)
def test_field_of_wrong_type_or_range_is_refused_by_name(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, tiny(**changes))
    assert isinstance(error, InvalidCheckpoint) and error.field == field
    assert field in str(error)


def test_fields_of_training_are_passed_over(tmp_path: Path) -> None:
    training = {"attention_dropout": 0.5, "initializer_range": 9.0, "use_cache": False}
    other = {"auto_map": {"AutoModel": "evil.py"}, "_name_or_path": "x", "pretraining_tp": 2}
    assert read(tmp_path, tiny(**training, **other)) == tiny_config()


def test_adapter_passed_as_base_is_told_so(tmp_path: Path) -> None:
    write_adapter(tmp_path, tiny_config(), seed=0)
    with pytest.raises(CheckpointNotFound, match="this is an adapter, not a base model"):
        read_model_config(str(tmp_path))


def test_generation_defaults_are_read_and_checked(tmp_path: Path) -> None:
    assert read_generation_defaults(str(tmp_path)) == {}
    fields = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0,
        "repetition_penalty": 1.05,
        "eos_token_id": [5, 6],
        "max_length": 4096,
        "transformers_version": "5",
    }
    write_json(tmp_path, "generation_config.json", fields)
    assert read_generation_defaults(str(tmp_path)) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.0,
        "repetition_penalty": 1.05,
        "eos_token_ids": (5, 6),
    }
    write_json(tmp_path, "generation_config.json", {"do_sample": False, "temperature": 0.6})
    assert read_generation_defaults(str(tmp_path)) == {"temperature": 0.0}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 1.5}))
    with pytest.raises(InvalidCheckpoint, match="top_k"):
        read_generation_defaults(str(tmp_path))
