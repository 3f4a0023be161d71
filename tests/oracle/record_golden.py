"""Record golden logits from transformers and PEFT.

Run `python tests/oracle/record_golden.py` where torch, transformers and peft are installed. Each
model becomes `golden/<model>/`: `base/` and `adapters/<name>/` as the two libraries save them,
and `logits.safetensors` with `tokens.<prompt>` (int32 [T]) and `logits.<adapter or base>.<prompt>`
(float32 [T, V]). Everything is seeded and float32 on CPU.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROMPTS = {
    "short": 11,
    "long": 72,
}  # lengths; the long one passes every window and rope boundary below

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {"q_v_r4": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}


def _rope(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0} | more}


# name -> (configuration class, fields over SHAPE, adapters: name -> LoraConfig fields)
MODELS: dict[str, tuple[type, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama_mha": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 4},
        {
            "q_r4": {"r": 4, "target_modules": ["q_proj"]},
            "qkvo_r64": {"r": 64, "lora_alpha": 32, "target_modules": list(ATTENTION)},
            "all_linear_r16": {"r": 16, "target_modules": "all-linear"},
            "mlp_rslora_r32": {"r": 32, "use_rslora": True, "target_modules": list(MLP)},
        },
    ),
    "llama_gqa": (
        transformers.LlamaConfig,
        {},
        {
            "patterns": {
                "r": 8,
                "target_modules": [*ATTENTION, *MLP],
                "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 16, "down_proj": 4},
                "alpha_pattern": {"v_proj": 32, r"layers\.1\.mlp\..*_proj": 3},
            },
            "rslora_patterns": {
                "r": 8,
                "use_rslora": True,
                "target_modules": ["q_proj", "o_proj", "up_proj"],
                "rank_pattern": {"o_proj": 20, "model.layers.1.mlp.up_proj": 2},
                "alpha_pattern": {"up_proj": 5},
            },
            "layer_1": {
                "r": 8,
                "target_modules": ["k_proj", "gate_proj"],
                "layers_to_transform": [1],
                "layers_pattern": "layers",
            },
            "regex_r8": {"r": 8, "target_modules": r".*\.layers\.\d+\.self_attn\.(q|o)_proj"},
            "excluded": {
                "r": 6,
                "target_modules": ["q_proj", "v_proj"],
                "exclude_modules": ["layers.0.self_attn.v_proj"],
            },
            "kv_r5_bf16": {"r": 5, "target_modules": ["k_proj", "v_proj"]},
        },
    ),
    "llama_bias_tied": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"all_linear_r4": {"r": 4, "target_modules": "all-linear"}},
    ),
    "mistral": (
        transformers.MistralConfig,
        {"sliding_window": 8},
        {"qkvo_r8": {"r": 8, "target_modules": list(ATTENTION)}},
    ),
    "qwen2": (
        transformers.Qwen2Config,
        {},
        {"q_v_down_r8": {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}},
    ),
    "qwen3": (
        transformers.Qwen3Config,
        {"head_dim": 32},
        {
            "qkvo_gate_rslora_r16": {
                "r": 16,
                "use_rslora": True,
                "target_modules": [*ATTENTION, "gate_proj"],
            }
        },
    ),
    "rope_linear": (transformers.LlamaConfig, _rope("linear", factor=2.0), SMALL),
    "rope_dynamic": (
        transformers.LlamaConfig,
        {"max_position_embeddings": 32} | _rope("dynamic", factor=2.0),
        SMALL,
    ),
    "rope_yarn": (
        transformers.LlamaConfig,
        _rope("yarn", factor=4.0, original_max_position_embeddings=32),
        SMALL,
    ),
    "rope_llama3": (
        transformers.LlamaConfig,
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        SMALL,
    ),
}


def _randomise(model: torch.nn.Module) -> None:
    """Weights large enough that every part of the model shows in the logits."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
        elif parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
        else:
            torch.nn.init.normal_(
                parameter, 0.0, 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            )


def _randomise_adapter(model: torch.nn.Module) -> None:
    """PEFT starts with B = 0; give A and B values whose product is as large as the base weights."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
        elif "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.5 * parameter.shape[1] ** -0.5)


@torch.no_grad()
def _run(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    output = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False)
    return output.logits[0].to(torch.float32).numpy()


def _record(name: str, seed: int) -> None:
    configuration, fields, adapters = MODELS[name]
    target = GOLDEN / name
    torch.manual_seed(seed)
    config = configuration(**(SHAPE | fields), attn_implementation="eager")
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomise(base)
    base.save_pretrained(target / "base")
    (target / "base" / "generation_config.json").unlink(missing_ok=True)
    rng = np.random.default_rng(seed)
    prompts = {
        prompt: rng.integers(3, 128, size).astype(np.int32) for prompt, size in PROMPTS.items()
    }
    found = {f"tokens.{prompt}": tokens for prompt, tokens in prompts.items()}
    found |= {f"logits.base.{prompt}": _run(base, tokens) for prompt, tokens in prompts.items()}
    for adapter, lora_fields in adapters.items():
        lora = LoraConfig(**({"lora_alpha": 16, "task_type": "CAUSAL_LM"} | lora_fields))
        # A fresh copy each time: get_peft_model changes the model it is given.
        fresh = transformers.AutoModelForCausalLM.from_pretrained(
            target / "base", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        model = get_peft_model(fresh, lora, autocast_adapter_dtype=False).eval()
        _randomise_adapter(model)
        if adapter.endswith("_bf16"):  # stored as bfloat16, applied to the float32 base
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
        found |= {
            f"logits.{adapter}.{prompt}": _run(model, tokens) for prompt, tokens in prompts.items()
        }
        if adapter.endswith("_bf16"):
            model = model.to(torch.bfloat16)
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(target / "adapters" / adapter)
        (target / "adapters" / adapter / "README.md").unlink(missing_ok=True)
    save_file(found, target / "logits.safetensors")
    print(f"{name}: {len(adapters)} adapters")


def _write_readme() -> None:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "safetensors": safetensors.__version__,
        "numpy": np.__version__,
    }
    lines = [f"| {name} | {version} |" for name, version in versions.items()]
    text = "\n".join(
        [
            "# Golden logits",
            "",
            "Written by `tests/oracle/record_golden.py`; do not edit. Float32 on CPU, eager "
            "attention, recorded with:",
            "",
            "| package | version |",
            "| --- | --- |",
            *lines,
            "",
        ]
    )
    (GOLDEN / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for seed, name in enumerate(MODELS):
        _record(name, seed)
    _write_readme()


if __name__ == "__main__":
    main()
