"""Tensor names in an adapter file -> (layer, module, half), or an error naming what it is.

Accepted: `<prefix>layers.<n>.<self_attn|mlp>.<module>.lora_<A|B>[.default].weight`, prefix being
one of a short list.
"""

from __future__ import annotations

import dataclasses
import re

from checkpoints.config_fields import shown
from checkpoints.errors import CheckpointError, InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.model_config import TARGET_MODULES

# PEFT writes the first; raw state dicts lack it; wrappers of multimodal models put language_model
# in between.
_PREFIXES = (
    "base_model.model.model.",
    "model.",
    "base_model.model.language_model.model.",
    "base_model.model.model.language_model.",
    "language_model.model.",
    "model.language_model.",
)
_TENSOR = re.compile(
    r"(?P<prefix>.*?)layers\.(?P<layer>\d{1,6})\.(?P<parent>self_attn|mlp)\.(?P<module>[a-z]+_proj)"
    r"\.lora_(?P<half>[AB])(?:\.default)?\.weight"
)
_UNSUPPORTED = (
    ("lora_magnitude_vector", "a DoRA magnitude, which is not supported"),
    ("lora_embedding_", "LoRA on an embedding, which is not supported"),
    ("trainable_tokens", "a set of trained tokens, which is not supported"),
    ("modules_to_save", "a full copy of a module (modules_to_save), which is not supported"),
    ("lora_B.bias", "a LoRA bias, which is not supported"),
    ("lora_B.default.bias", "a LoRA bias, which is not supported"),
    ("base_layer", "a weight of the base model, which an adapter must not change"),
    ("lm_head", "a weight of lm_head, which is not supported"),
    ("embed_tokens", "a weight of the embedding, which is not supported"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorName:
    layer: int
    module: str
    half: str  # "A" or "B"


def parse_tensor_name(name: str, num_layers: int, path: str) -> TensorName:
    """Place one tensor.

    Raises: UnsupportedCheckpoint: PEFT knows it, we do not. InvalidCheckpoint: anything else.
    """
    found = _TENSOR.fullmatch(name) if len(name) <= 500 else None
    if found is None or found["prefix"] not in _PREFIXES:
        raise _unplaced(name, path)
    module, parent, layer = found["module"], found["parent"], int(found["layer"])
    is_mlp = module in ("gate_proj", "up_proj", "down_proj")
    if module not in TARGET_MODULES or is_mlp != (parent == "mlp"):
        raise InvalidCheckpoint(
            f"{path}: tensor {shown(name)}: the base model has no {parent}.{module}", field=name
        )
    if layer >= num_layers:
        raise InvalidCheckpoint(
            f"{path}: tensor {shown(name)}: the base model has {num_layers} layers, numbered from "
            "0",
            field=name,
        )
    return TensorName(layer, module, found["half"])


def _unplaced(name: str, path: str) -> CheckpointError:
    for part, what in _UNSUPPORTED:
        if part in name:
            return UnsupportedCheckpoint(f"{path}: tensor {shown(name)} is {what}", field=name)
    return InvalidCheckpoint(
        f"{path}: tensor {shown(name)} belongs to no module of the base model; "
        "names look like base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        field=name,
    )
