"""Rotary embedding settings from a `config.json`, in the spelling of transformers 4 or 5.

4: `rope_theta` beside `rope_scaling {"rope_type" or "type", "factor", ...}`. 5: one
`rope_parameters {"rope_type", "rope_theta", "factor", ...}`, which may be nested by layer type;
that is accepted when all layer types agree.
Source: transformers 5.23, `modeling_rope_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.config_fields import ConfigFields, shown
from checkpoints.errors import InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.model_config import RopeConfig

_DEFAULT_THETA = 10_000.0
_COMMON = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
        | {"attention_factor", "mscale", "mscale_all_dim", "truncate"}
    ),
    "llama3": frozenset(
        {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    ),
}
# Written by some exporters with no effect on the type in question; dropped only at the value that
# has none.
_NEUTRAL = {"factor": 1.0, "attention_factor": 1.0}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_rope_config(fields: ConfigFields, max_position_embeddings: int) -> RopeConfig:
    """The rotary settings. Raises UnsupportedCheckpoint or InvalidCheckpoint with the field."""
    name, parameters = _parameters(fields)
    rope = ConfigFields(parameters, f"{fields.where}: {name}")
    rope_type = _rope_type(rope)
    _check_known(rope, rope_type)
    theta = _theta(fields, rope)
    if rope_type == "default":
        return RopeConfig(theta=theta)
    factor = rope.number("factor", above=0.0)
    if rope_type in ("linear", "dynamic"):
        return RopeConfig(rope_type=rope_type, theta=theta, factor=factor)
    original = _original_length(fields, rope, max_position_embeddings)
    if rope_type == "llama3":
        low, high = (
            rope.number("low_freq_factor", above=0.0),
            rope.number("high_freq_factor", above=0.0),
        )
        if high <= low:
            raise rope.error(
                "high_freq_factor", high, f"a number greater than low_freq_factor ({low:g})"
            )
        return RopeConfig(
            rope_type="llama3",
            theta=theta,
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", None, above=0.0) or 32.0,
        beta_slow=rope.number("beta_slow", None, above=0.0) or 1.0,
        attention_factor=rope.number("attention_factor", None, above=0.0),
        mscale=rope.number("mscale", None),
        mscale_all_dim=rope.number("mscale_all_dim", None),
        truncate=rope.boolean("truncate", True),
    )


def _parameters(fields: ConfigFields) -> tuple[str, dict[str, Any]]:
    """(field name, flat parameters). Both spellings at once must say the same."""
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if scaling and parameters and scaling != parameters:
        raise InvalidCheckpoint(
            f"{fields.where}: rope_scaling and rope_parameters are both given and differ",
            field="rope_scaling",
        )
    name = "rope_parameters" if parameters else "rope_scaling"
    found = parameters or scaling
    nested = {key: found[key] for key in _LAYER_TYPES if isinstance(found.get(key), Mapping)}
    if not nested:
        return name, found
    used = _used_layer_types(fields)
    chosen = [value for key, value in nested.items() if key in used] or list(nested.values())
    if len(nested) != len(found) or any(value != chosen[0] for value in chosen):
        raise UnsupportedCheckpoint(
            f"{fields.where}: {name} differs between layer types ({', '.join(found)}); one setting "
            "for all layers is supported",
            field=name,
        )
    return name, dict(chosen[0])


def _used_layer_types(fields: ConfigFields) -> frozenset[str]:
    types = fields.values.get("layer_types")
    return (
        frozenset(t for t in types if isinstance(t, str))
        if isinstance(types, list)
        else frozenset()
    )


def _rope_type(rope: ConfigFields) -> str:
    new, old = rope.text("rope_type", None), rope.text("type", None)
    if new is not None and old is not None and new != old:
        raise InvalidCheckpoint(
            f"{rope.where}: rope_type is {new!r} but type is {old!r}", field="rope_type"
        )
    rope_type: str = new or old or "default"
    if rope_type not in _FIELDS:
        raise UnsupportedCheckpoint(
            f"{rope.where}: rope_type is {shown(rope_type)}, supported are {', '.join(_FIELDS)}",
            field="rope_type",
        )
    return rope_type


def _check_known(rope: ConfigFields, rope_type: str) -> None:
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedCheckpoint(
            f"{rope.where}: partial_rotary_factor other than 1 is not supported",
            field="partial_rotary_factor",
        )
    known = _COMMON | _FIELDS[rope_type]
    for key, value in rope.values.items():
        if key not in known and value is not None and value != _NEUTRAL.get(key):
            raise UnsupportedCheckpoint(
                f"{rope.where}: {shown(key)} = {shown(value)} is not known for rope_type "
                f"{rope_type!r}",
                field=key,
            )


def _theta(fields: ConfigFields, rope: ConfigFields) -> float:
    inner, outer = (
        rope.number("rope_theta", None, above=0.0),
        fields.number("rope_theta", None, above=0.0),
    )
    if inner is not None and outer is not None and inner != outer:
        raise InvalidCheckpoint(
            f"{rope.where}: rope_theta is {inner:g}, beside it {outer:g}; they must agree",
            field="rope_theta",
        )
    theta: float = inner or outer or _DEFAULT_THETA
    return theta


def _original_length(fields: ConfigFields, rope: ConfigFields, max_position_embeddings: int) -> int:
    """The outer field wins, as in transformers; without either it is the model's length."""
    outer = fields.integer("original_max_position_embeddings", None)
    inner = rope.integer("original_max_position_embeddings", None)
    length: int = outer or inner or max_position_embeddings
    return length
