"""`adapter_config.json` of a PEFT LoRA adapter -> what to apply where, with which scaling.

Every field of PEFT 0.21's `LoraConfig` falls in one class: honoured, without effect at inference
(passed over), or refused by name. A field that PEFT does not have is refused unless it is empty: it
may well change what the adapter means.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

from checkpoints.config_fields import ConfigFields, read_fields, shown
from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.model_config import TARGET_MODULES
from checkpoints.module_patterns import MatchBudget, ModulePattern

CONFIG_FILE = "adapter_config.json"

_HONOURED = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
    }
    | {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
    }
)
_NO_EFFECT = frozenset(
    {
        "revision",
        "task_type",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "lora_dropout",
        "fan_in_fan_out",
    }
    | {"megatron_core", "qalora_group_size", "eva_config", "runtime_config", "ensure_weight_tying"}
    | {"unsloth_fixed", "merge_weights"}
)
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")
_INIT_WITHOUT_EFFECT = (None, True, False, "gaussian", "orthogonal", "eva")
_HINTS = {
    "modules_to_save": "merge the adapter into the base with PEFT's merge_and_unload() and serve "
    "the result as a base model",
    "use_dora": "retrain without DoRA, or merge the adapter into the base",
    "bias": "retrain with bias='none'",
    "init_lora_weights": "convert it when saving, with path_initial_model_for_weight_conversion",
}
_MAX_TARGETS = 100_000
_MAX_PATTERNS = 4096
Value = TypeVar("Value")
_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """The fields that matter at inference. Module paths are those inside the base model."""

    where: str  # the file, for messages
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[ModulePattern, int], ...]
    alpha_pattern: tuple[tuple[ModulePattern, float], ...]
    target_modules: frozenset[str] | ModulePattern | None  # None: not stated, the tensors decide
    exclude_modules: frozenset[str] | ModulePattern
    layers_to_transform: frozenset[int]  # empty: all
    base_model_name: str | None

    def rank_of(self, path: str) -> int:
        return next(
            (rank for pattern, rank in self.rank_pattern if pattern.match_suffix(path)), self.rank
        )

    def scaling_of(self, path: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        alpha = next(
            (a for pattern, a in self.alpha_pattern if pattern.match_suffix(path)), self.alpha
        )
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, path: str, layer: int) -> bool:
        """Whether PEFT would put LoRA on the module at `path`; target_modules must be known."""
        if _selects(self.exclude_modules, path):
            return False
        if isinstance(self.target_modules, ModulePattern):
            return self.target_modules.fullmatch(path)
        names = self.target_modules or frozenset()
        if path in names:  # a full path is not filtered by layer, as in PEFT
            return True
        if self.layers_to_transform and layer not in self.layers_to_transform:
            return False
        return _selects(names, path)


def read_peft_config(path: str, *, num_layers: int, root: str | None = None) -> PeftConfig:
    """Read `adapter_config.json` in directory `path`, for a base of `num_layers` layers.

    Raises: CheckpointNotFound, InvalidCheckpoint, UnsupportedCheckpoint; `field` is the field at
            fault.
    """
    file = os.path.join(path, CONFIG_FILE)
    if not os.path.lexists(file) and os.path.exists(os.path.join(path, "config.json")):
        raise CheckpointNotFound(
            f"{path}: holds config.json but no {CONFIG_FILE}: this is a full model, not an "
            "adapter; serve it as the base model"
        )
    fields = read_fields(file, root=root)
    _check_supported(fields)
    budget = MatchBudget()
    return PeftConfig(
        where=file,
        rank=fields.integer("r", 8),
        alpha=_alpha(fields, "lora_alpha", fields.values.get("lora_alpha", 8)),
        use_rslora=fields.boolean("use_rslora", False),
        rank_pattern=_patterns(fields, "rank_pattern", budget, _rank),
        alpha_pattern=_patterns(fields, "alpha_pattern", budget, _alpha),
        target_modules=_target_modules(fields, budget),
        exclude_modules=_modules(fields, "exclude_modules", budget),
        layers_to_transform=_layers(fields, num_layers),
        base_model_name=fields.text("base_model_name_or_path", None),
    )


def _selects(names: frozenset[str] | ModulePattern, path: str) -> bool:
    if isinstance(names, ModulePattern):
        return names.fullmatch(path)
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _check_supported(fields: ConfigFields) -> None:
    peft_type = fields.text("peft_type", "LORA")
    if peft_type != "LORA":
        raise UnsupportedCheckpoint(
            f"{fields.where}: peft_type is {shown(peft_type)}, supported is 'LORA'",
            field="peft_type",
        )
    init = fields.values.get("init_lora_weights")
    if not any(
        init is known or (isinstance(init, str) and init == known) for known in _INIT_WITHOUT_EFFECT
    ):
        raise _refusal(fields, "init_lora_weights", init)
    if fields.values.get("bias") not in (None, "none"):
        raise _refusal(fields, "bias", fields.values["bias"])
    for name, value in fields.values.items():
        if (
            name not in _HONOURED
            and name not in _NO_EFFECT
            and name != "bias"
            and not _is_empty(value)
        ):
            raise _refusal(fields, name, value)


def _is_empty(value: object) -> bool:
    return any(
        value is empty or (type(value) is type(empty) and value == empty) for empty in _EMPTY
    )


def _refusal(fields: ConfigFields, name: str, value: object) -> UnsupportedCheckpoint:
    hint = f"; {_HINTS[name]}" if name in _HINTS else ""
    return UnsupportedCheckpoint(
        f"{fields.where}: {shown(name)[1:-1]} = {shown(value)} is not supported{hint}", field=name
    )


def _alpha(fields: ConfigFields, name: str, value: object) -> float:
    alpha = fields.checked_number(name, 8 if value is None else value)
    if alpha == 0:
        raise fields.error(
            name, value, "a number other than 0, which would leave the base model unchanged"
        )
    return alpha


def _rank(fields: ConfigFields, name: str, value: object) -> int:
    rank: int = ConfigFields({name: value}, fields.where).integer(name)
    return rank


def _patterns(
    fields: ConfigFields,
    field: str,
    budget: MatchBudget,
    read_value: Callable[[ConfigFields, str, object], Value],
) -> tuple[tuple[ModulePattern, Value], ...]:
    """rank_pattern or alpha_pattern, in the order of the file: the first that matches wins."""
    found = fields.mapping(field)
    if len(found) > _MAX_PATTERNS:
        raise fields.error(field, len(found), f"at most {_MAX_PATTERNS} patterns")
    return tuple(
        (
            ModulePattern(key, budget, field=field, where=fields.where),
            read_value(fields, f"{field}[{key}]", value),
        )
        for key, value in found.items()
    )


def _target_modules(
    fields: ConfigFields, budget: MatchBudget
) -> frozenset[str] | ModulePattern | None:
    value = fields.values.get("target_modules")
    if value is None:
        return None
    if isinstance(value, str) and value.lower() == "all-linear":
        return frozenset(TARGET_MODULES)
    found = _modules(fields, "target_modules", budget)
    if not found:
        raise fields.error(
            "target_modules", value, "a non-empty list of module names, a pattern, or all-linear"
        )
    for name in found if isinstance(found, frozenset) else ():
        if name.rpartition(".")[2] in _EMBEDDINGS:
            raise UnsupportedCheckpoint(
                f"{fields.where}: target_modules names {name!r}; LoRA on the embedding or lm_head "
                "is not supported",
                field="target_modules",
            )
    return found


def _modules(
    fields: ConfigFields, name: str, budget: MatchBudget
) -> frozenset[str] | ModulePattern:
    """A list of names (or path endings), or one pattern that must match the full path."""
    value = fields.values.get(name)
    if isinstance(value, str) and value:
        return ModulePattern(value, budget, field=name, where=fields.where)
    if value in (None, ""):
        return frozenset()
    if (
        not isinstance(value, list)
        or not all(isinstance(v, str) for v in value)
        or len(value) > _MAX_TARGETS
    ):
        raise fields.error(name, value, "a list of module names or a pattern")
    return frozenset(value)


def _layers(fields: ConfigFields, num_layers: int) -> frozenset[int]:
    value = fields.values.get("layers_to_transform")
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < num_layers for n in layers
    ):
        raise fields.error(
            "layers_to_transform", value, f"layer numbers from 0 to {num_layers - 1}"
        )
    patterns = fields.values.get("layers_pattern")
    names = patterns if isinstance(patterns, list) else [patterns] if patterns else []
    # The only numbered list in these models is `model.layers`.
    if layers and names and "layers" not in names:
        raise InvalidCheckpoint(
            f"{fields.where}: layers_pattern is {shown(patterns)}, the base numbers its layers "
            "under 'layers'",
            field="layers_pattern",
        )
    return frozenset(layers)
