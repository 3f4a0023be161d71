"""`config.json` and `generation_config.json` of a Hugging Face directory -> plain values.

Every field that changes what the model computes is honoured, or refused by name. Fields that only
matter in training are passed over. Defaults are those of the configuration classes in transformers
5.23.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from checkpoints.config_fields import ConfigFields, read_fields, shown
from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.file_access import check_directory
from checkpoints.model_config import ModelConfig
from checkpoints.rope_config import read_rope_config


@dataclasses.dataclass(frozen=True, slots=True)
class _Family:
    """What the architecture fixes, and its defaults for absent fields."""

    model_type: str
    qkv_bias: bool = False  # always, whatever the config says
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # None: hidden_size / num_heads
    num_kv_heads: int | None = None  # None: num_heads
    sliding_window: int | None = None
    has_window_switch: bool = False  # use_sliding_window and max_window_layers count
    token_id_defaults: tuple[int | None, int | None] = (None, None)  # bos, eos


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        "llama", reads_attention_bias=True, reads_mlp_bias=True, token_id_defaults=(1, 2)
    ),
    "MistralForCausalLM": _Family(
        "mistral", num_kv_heads=8, sliding_window=4096, token_id_defaults=(1, 2)
    ),
    "Qwen2ForCausalLM": _Family(
        "qwen2", qkv_bias=True, num_kv_heads=32, sliding_window=4096, has_window_switch=True
    ),
    "Qwen3ForCausalLM": _Family(
        "qwen3",
        reads_attention_bias=True,
        qk_norm=True,
        head_dim=128,
        num_kv_heads=32,
        sliding_window=4096,
        has_window_switch=True,
    ),
}

# Fields of neighbouring architectures that would change the result, with the values at which they
# do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": ({},),
    "compression_config": ({},),
    "hidden_activation": ("silu",),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "scale_emb": (1, 1.0),
    "no_rope_layers": ([],),
    "attention_chunk_size": (),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "is_encoder_decoder": (False,),
    "cross_attention_hidden_size": (),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "use_qk_norm": (False,),
    "clip_qkv": (),
}
_DTYPES = ("bfloat16", "float16", "float32")


def read_model_config(path: str, *, root: str | None = None) -> ModelConfig:
    """Read `config.json` in directory `path`.

    Raises: CheckpointNotFound, InvalidCheckpoint, UnsupportedCheckpoint; `field` is the field at
            fault.
    """
    check_directory(path, root=root)
    if not os.path.exists(os.path.join(path, "config.json")) and os.path.exists(
        os.path.join(path, "adapter_config.json")
    ):
        raise CheckpointNotFound(
            f"{path}: holds adapter_config.json but no config.json: this is an adapter, not a base "
            "model"
        )
    fields = read_fields(os.path.join(path, "config.json"), root=root)
    architecture, family = _family(fields)
    _check_refused(fields)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers", maximum=10_000)
    max_positions = fields.integer("max_position_embeddings")
    attention_bias = fields.boolean("attention_bias", False) and family.reads_attention_bias
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_num_kv_heads(fields, family, heads),
        head_dim=_head_dim(fields, family, hidden, heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, above=0.0),
        rope=read_rope_config(fields, max_positions),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.boolean("mlp_bias", False) and family.reads_mlp_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(fields, family, layers),
        bos_token_id=_bos_token_id(fields, family),
        eos_token_ids=_eos_token_ids(fields, family),
        dtype=_dtype(fields),
    )


def read_generation_defaults(path: str, *, root: str | None = None) -> dict[str, Any]:
    """Sampling defaults in `generation_config.json`; empty if there is no such file.

    Returns: those present of temperature, top_p, top_k, min_p, repetition_penalty (numbers) and
             eos_token_ids (tuple of int).
             `do_sample: false` gives temperature 0.0, whatever the other fields say.
    """
    file = os.path.join(path, "generation_config.json")
    if not os.path.lexists(file):
        return {}
    fields = read_fields(file, root=root)
    found: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if name in fields:
            found[name] = fields.number(name)
    if "top_k" in fields:
        found["top_k"] = fields.integer("top_k", minimum=0)
    if fields.values.get("do_sample") is False:
        found["temperature"] = 0.0
    if "eos_token_id" in fields:
        found["eos_token_ids"] = fields.token_ids("eos_token_id")
    return found


def _family(fields: ConfigFields) -> tuple[str, _Family]:
    names = fields.values.get("architectures")
    model_type = fields.text("model_type", None)
    if not names and model_type is not None:
        names = [name for name, family in _FAMILIES.items() if family.model_type == model_type]
        if not names:
            raise UnsupportedCheckpoint(
                f"{fields.where}: model_type is {shown(model_type)}, supported are llama, mistral, "
                "qwen2, qwen3",
                field="model_type",
            )
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(_FAMILIES):
        raise UnsupportedCheckpoint(
            f"{fields.where}: architectures is {shown(names)}, supported is one of "
            f"{', '.join(_FAMILIES)}",
            field="architectures",
        )
    family = _FAMILIES[names[0]]
    if model_type not in (None, family.model_type):
        raise InvalidCheckpoint(
            f"{fields.where}: model_type is {shown(model_type)}, {names[0]} is "
            f"{family.model_type!r}",
            field="model_type",
        )
    return names[0], family


def _check_refused(fields: ConfigFields) -> None:
    for name, neutral in _REFUSED.items():
        value = fields.values.get(name)
        if value is not None and value not in neutral:
            raise UnsupportedCheckpoint(
                f"{fields.where}: {name} = {shown(value)} is not supported", field=name
            )
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedCheckpoint(
            f"{fields.where}: hidden_act is {shown(fields.values['hidden_act'])}, supported is "
            "silu",
            field="hidden_act",
        )


def _num_kv_heads(fields: ConfigFields, family: _Family, heads: int) -> int:
    # Absent takes the class default, null means "as many as query heads".
    absent = "num_key_value_heads" not in fields.values
    default = family.num_kv_heads if absent and family.num_kv_heads else heads
    count: int = fields.integer("num_key_value_heads", default)
    if heads % count:
        raise fields.error(
            "num_key_value_heads", count, f"a divisor of num_attention_heads ({heads})"
        )
    return count


def _head_dim(fields: ConfigFields, family: _Family, hidden: int, heads: int) -> int:
    default = family.head_dim if "head_dim" not in fields.values else None
    size: int | None = fields.integer("head_dim", default)
    if size is None:
        if hidden % heads:
            raise fields.error(
                "hidden_size", hidden, f"a multiple of num_attention_heads ({heads})"
            )
        size = hidden // heads
    if size % 2:
        raise fields.error("head_dim", size, "an even number")
    return size


def _sliding_window(fields: ConfigFields, family: _Family, layers: int) -> int | None:
    """The window of every layer, or None. Layers that differ from each other are refused."""
    kinds = _layer_types(fields, layers)
    if family.sliding_window is None:
        if fields.values.get("sliding_window") is not None:
            raise UnsupportedCheckpoint(
                f"{fields.where}: sliding_window is not supported for {family.model_type}",
                field="sliding_window",
            )
        window = None
    else:
        absent = "sliding_window" not in fields.values
        window = fields.integer("sliding_window", family.sliding_window if absent else None)
    if family.has_window_switch and not fields.boolean("use_sliding_window", False):
        return None
    has_window = [window is not None] * layers
    if family.has_window_switch and window is not None:
        first = fields.integer("max_window_layers", 28, minimum=0)
        has_window = [layer >= first for layer in range(layers)]
    if kinds:
        # Where layer_types is given it decides, but only the Qwen classes read it.
        named = [kind == "sliding_attention" for kind in kinds]
        if not family.has_window_switch and named != has_window:
            raise UnsupportedCheckpoint(
                f"{fields.where}: layer_types contradicts sliding_window = {window}",
                field="layer_types",
            )
        has_window = named
    if any(has_window) and not all(has_window):
        raise UnsupportedCheckpoint(
            f"{fields.where}: sliding_window holds for some layers only "
            "(max_window_layers or layer_types); supported is all layers or none",
            field="layer_types" if kinds else "max_window_layers",
        )
    return window if any(has_window) else None


def _layer_types(fields: ConfigFields, layers: int) -> list[str]:
    """The kind of each layer, or an empty list if the config does not say."""
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return []
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise UnsupportedCheckpoint(
            f"{fields.where}: layer_types is {shown(kinds)}, "
            f"supported are {layers} of {' or '.join(known)}",
            field="layer_types",
        )
    return kinds


def _bos_token_id(fields: ConfigFields, family: _Family) -> int | None:
    default = family.token_id_defaults[0] if "bos_token_id" not in fields.values else None
    found: int | None = fields.integer("bos_token_id", default, minimum=0)
    return found


def _eos_token_ids(fields: ConfigFields, family: _Family) -> tuple[int, ...]:
    default = family.token_id_defaults[1]
    if "eos_token_id" not in fields.values and default is not None:
        return (default,)
    return fields.token_ids("eos_token_id")


def _dtype(fields: ConfigFields) -> str:
    new, old = fields.text("dtype", None), fields.text("torch_dtype", None)
    name = (new or old or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        field = "dtype" if new else "torch_dtype"
        raise UnsupportedCheckpoint(
            f"{fields.where}: {field} is {shown(name)}, supported are {', '.join(_DTYPES)}",
            field=field,
        )
    return str(name)
