"""Checks of an adapter against its config, the base model and a target dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.config_fields import shown
from checkpoints.errors import InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.hf_weights import module_path
from checkpoints.model_config import TARGET_MODULES, ModelConfig
from checkpoints.module_patterns import ModulePattern
from checkpoints.peft_config import PeftConfig
from checkpoints.safetensors_file import SafetensorsFile

_FLOATS = ("float32", "float16", "bfloat16")


def check_targets(
    peft: PeftConfig, config: ModelConfig, pairs: Mapping[tuple[int, str], object], file: str
) -> None:
    """The tensors present are exactly those that the config targets."""
    if peft.target_modules is None:
        return
    paths = {(n, m): module_path(n, m) for n in range(config.num_layers) for m in TARGET_MODULES}
    targeted = {key for key, path in paths.items() if peft.targets(path, key[0])}
    for key, path in paths.items():
        if key in targeted and key not in pairs:
            raise InvalidCheckpoint(
                f"{file}: target_modules covers {path}, but the file holds no tensor for it",
                field="target_modules",
            )
        if key in pairs and key not in targeted:
            raise InvalidCheckpoint(
                f"{file}: holds LoRA weights for {path}, which target_modules does not cover",
                field="target_modules",
            )
    if isinstance(peft.target_modules, ModulePattern):
        return
    parts = [path.split(".") for path in paths.values()]
    endings = {".".join(part[start:]) for part in parts for start in range(len(part))}
    for name in sorted(peft.target_modules):
        if name not in endings:
            raise InvalidCheckpoint(
                f"{peft.where}: target_modules names {shown(name)}, which the base model does not "
                "have",
                field="target_modules",
            )


def check_shapes(
    file: SafetensorsFile,
    peft: PeftConfig,
    config: ModelConfig,
    key: tuple[int, str],
    names: Mapping[str, str],
) -> int:
    """The rank. Raises InvalidCheckpoint or UnsupportedCheckpoint."""
    path = module_path(*key)
    size_in, size_out = config.module_shape(key[1])
    trained_for = f"; trained for {shown(peft.base_model_name)}" if peft.base_model_name else ""
    for half, axis, size in (("A", 1, size_in), ("B", 0, size_out)):
        shape = file.shape(names[half])
        if len(shape) != 2 or shape[axis] != size or 0 in shape:
            wanted = f"[*, {size}]" if half == "A" else f"[{size}, *]"
            raise InvalidCheckpoint(
                f"{file.path}: {path} lora_{half} is {list(shape)}, base {config.architecture} "
                f"expects {wanted}{trained_for}",
                field=names[half],
            )
        if file.dtype(names[half]).name not in _FLOATS:
            raise UnsupportedCheckpoint(
                f"{file.path}: {shown(names[half])} is {file.dtype(names[half]).name}, supported "
                f"are {', '.join(_FLOATS)}",
                field=names[half],
            )
    rank, rank_b = file.shape(names["A"])[0], file.shape(names["B"])[1]
    if rank != rank_b:
        raise InvalidCheckpoint(
            f"{file.path}: {path} lora_A has rank {rank}, lora_B has rank {rank_b}",
            field=names["B"],
        )
    if rank != peft.rank_of(path):
        field = "rank_pattern" if any(p.match_suffix(path) for p, _ in peft.rank_pattern) else "r"
        raise InvalidCheckpoint(
            f"{file.path}: {path} has rank {rank}, {field} in the config says {peft.rank_of(path)}",
            field=field,
        )
    return rank


def check_values(
    values: NDArray[Any], factor: float, dtype: str | None, name: str, path: str
) -> None:
    largest = _largest_magnitude(values)
    if not np.isfinite(largest):
        raise InvalidCheckpoint(f"{path}: {shown(name)} holds NaN or infinite values", field=name)
    if dtype is None:
        return
    limit = float(ml_dtypes.finfo(dtype).max)
    if largest * max(abs(factor), 1.0) > limit:
        raise InvalidCheckpoint(
            f"{path}: {shown(name)} holds {largest:g} (scaling {factor:g}), {dtype} ends at "
            f"{limit:g}",
            field=name,
        )


def _largest_magnitude(values: NDArray[Any]) -> float:
    """Largest absolute value; NaN if there is one, else infinity if there is one.

    Without its sign bit an IEEE number orders as an unsigned integer, with infinity and then NaN on
    top: one integer reduction finds every fault, at any width, without warnings.
    """
    unsigned = np.dtype(f"u{values.itemsize}")
    bits = values.reshape(-1).view(unsigned)
    largest = (bits & unsigned.type(2 ** (8 * values.itemsize - 1) - 1)).max()
    return float(np.array([largest], unsigned).view(values.dtype)[0])
