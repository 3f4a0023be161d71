"""The one sharding table: which slices of which checkpoint tensors make each parameter on each
device.

Parameters keep the checkpoint's `[out, in]` layout, so that loading is slicing. A parameter is the
concatenation, along axis 0, of its pieces; the global array of a parameter stacks the devices'
parameters along the sharded axis, in device order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax.sharding import PartitionSpec

from checkpoints.model_config import ModelConfig
from sloraj.config import div_ceil
from sloraj.parallel.mesh import AXIS, local_kv_heads

COLUMN = PartitionSpec(AXIS)  # output rows split
ROW = PartitionSpec(None, AXIS)  # input columns split
WHOLE = PartitionSpec()
QUANTIZED = ("qkv", "o", "gate_up", "down")  # the rest keeps the model's dtype
QUANTIZED_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """`tensor[rows, columns]` of a checkpoint; `pad_rows` zero rows follow it."""

    tensor: str
    rows: slice | None = None
    columns: slice | None = None
    pad_rows: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ParamRule:
    """Where a parameter comes from and how it lies on the mesh."""

    shape: tuple[int, ...]  # per device
    spec: PartitionSpec
    pieces: Callable[[int], list[Piece]]  # device index -> pieces
    dtype: str | None = None  # None: the model's

    def global_shape(self, tp: int) -> tuple[int, ...]:
        return tuple(
            n * tp if axis < len(self.spec) and self.spec[axis] == AXIS else n
            for axis, n in enumerate(self.shape)
        )


def _span(device: int, size: int) -> slice:
    return slice(device * size, (device + 1) * size)


def _whole(tensor: str, size: int) -> ParamRule:
    return ParamRule((size,), WHOLE, lambda _: [Piece(tensor)])


def _vocab(tensor: str, config: ModelConfig, tp: int) -> ParamRule:
    rows = div_ceil(config.vocab_size, tp)

    def pieces(device: int) -> list[Piece]:
        start = min(device * rows, config.vocab_size)
        stop = min(start + rows, config.vocab_size)
        return [Piece(tensor, slice(start, stop), pad_rows=rows - (stop - start))]

    return ParamRule((rows, config.hidden_size), COLUMN, pieces)


def top_rules(config: ModelConfig, tp: int) -> dict[str, ParamRule]:
    """Rules of the parameters outside the layers."""
    rules = {
        "embed": _vocab("model.embed_tokens.weight", config, tp),
        "norm": _whole("model.norm.weight", config.hidden_size),
    }
    if not config.tie_word_embeddings:
        rules["lm_head"] = _vocab("lm_head.weight", config, tp)
    return rules


def quantized_rules(rules: dict[str, ParamRule], quantization: str) -> dict[str, ParamRule]:
    """A layer's rules with its linear weights in one byte each, and their scales beside them.

    `<name>_scale` is float32, one for each output feature: it lies where its row of the weight
    lies, so with the rows of a column-split weight, and whole where the columns are split. Scales
    have no pieces: they are made from the weights once those are loaded.
    """
    found = dict(rules)
    for name in QUANTIZED:
        rule = rules[name]
        found[name] = dataclasses.replace(rule, dtype=QUANTIZED_DTYPES[quantization])
        found[f"{name}_scale"] = ParamRule(
            rule.shape[:1], WHOLE if rule.spec == ROW else COLUMN, lambda _: [], "float32"
        )
    return found


def layer_rules(
    config: ModelConfig, tp: int, layer: int, quantization: str | None = None
) -> dict[str, ParamRule]:
    """Rules of one decoder layer's parameters."""
    rules = _layer_rules(config, tp, layer)
    return rules if quantization is None else quantized_rules(rules, quantization)


def _layer_rules(config: ModelConfig, tp: int, layer: int) -> dict[str, ParamRule]:
    prefix = f"model.layers.{layer}."
    d, f = config.hidden_size, config.intermediate_size // tp
    q = config.num_heads // tp * config.head_dim
    kv_heads = local_kv_heads(config, tp)
    kv = kv_heads * config.head_dim

    def kv_span(device: int) -> slice:
        first = device * config.num_kv_heads // tp
        return slice(first * config.head_dim, first * config.head_dim + kv)

    def qkv(kind: str) -> Callable[[int], list[Piece]]:
        return lambda device: [
            Piece(f"{prefix}self_attn.q_proj.{kind}", _span(device, q)),
            Piece(f"{prefix}self_attn.k_proj.{kind}", kv_span(device)),
            Piece(f"{prefix}self_attn.v_proj.{kind}", kv_span(device)),
        ]

    def gate_up(kind: str) -> Callable[[int], list[Piece]]:
        return lambda device: [
            Piece(f"{prefix}mlp.gate_proj.{kind}", _span(device, f)),
            Piece(f"{prefix}mlp.up_proj.{kind}", _span(device, f)),
        ]

    def row(module: str, size: int) -> Callable[[int], list[Piece]]:
        return lambda device: [Piece(f"{prefix}{module}.weight", columns=_span(device, size))]

    rules = {
        "input_norm": _whole(f"{prefix}input_layernorm.weight", d),
        "qkv": ParamRule((q + 2 * kv, d), COLUMN, qkv("weight")),
        "o": ParamRule((d, q), ROW, row("self_attn.o_proj", q)),
        "post_norm": _whole(f"{prefix}post_attention_layernorm.weight", d),
        "gate_up": ParamRule((2 * f, d), COLUMN, gate_up("weight")),
        "down": ParamRule((d, f), ROW, row("mlp.down_proj", f)),
    }
    if config.qkv_bias:
        rules["qkv_bias"] = ParamRule((q + 2 * kv,), COLUMN, qkv("bias"))
    if config.o_bias:
        rules["o_bias"] = _whole(f"{prefix}self_attn.o_proj.bias", d)
    if config.mlp_bias:
        rules["gate_up_bias"] = ParamRule((2 * f,), COLUMN, gate_up("bias"))
        rules["down_bias"] = _whole(f"{prefix}mlp.down_proj.bias", d)
    if config.qk_norm:
        rules["q_norm"] = _whole(f"{prefix}self_attn.q_norm.weight", config.head_dim)
        rules["k_norm"] = _whole(f"{prefix}self_attn.k_norm.weight", config.head_dim)
    return rules
