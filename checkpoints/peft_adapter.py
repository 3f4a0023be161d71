"""A PEFT LoRA adapter directory -> host arrays, all of it or an error.

Every tensor in the file is placed and every module that the config targets has its tensors; nothing
is skipped, so an adapter that loads is the adapter that was trained. Arrays are owned copies: the
file may be replaced afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.adapter_checks import check_shapes, check_targets, check_values
from checkpoints.adapter_names import TensorName, parse_tensor_name
from checkpoints.config_fields import shown
from checkpoints.errors import (
    CheckpointError,
    CheckpointNotFound,
    InvalidCheckpoint,
    UnsupportedCheckpoint,
)
from checkpoints.file_access import check_directory
from checkpoints.hf_weights import module_path
from checkpoints.model_config import TARGET_MODULES, ModelConfig
from checkpoints.peft_config import PeftConfig, read_peft_config
from checkpoints.safetensors_file import SafetensorsFile

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_CONVERT = (
    'convert with: python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')\""
)


@dataclasses.dataclass(frozen=True, slots=True)
class LoraModule:
    """One low-rank update, W + scaling * b @ a; C-contiguous, in the dtype of the file."""

    a: NDArray[Any]  # [rank, in]
    b: NDArray[Any]  # [out, rank]
    scaling: float
    rank: int


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One version of one adapter, complete."""

    path: str
    version: (
        str  # sha256 hex of everything that decides the result: tensors, scalings, load options
    )
    modules: Mapping[
        tuple[int, str], LoraModule
    ]  # (layer, module), sorted by layer, then TARGET_MODULES order
    max_rank: int  # the largest rank among the modules
    base_model_name: str | None

    @property
    def num_bytes(self) -> int:
        return sum(module.a.nbytes + module.b.nbytes for module in self.modules.values())


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterReport:
    """What `check_adapter` found; `problem` is None, or the message that loading gives."""

    path: str
    problem: str | None
    field: str | None = None
    version: str | None = None
    base_model_name: str | None = None
    ranks: tuple[int, ...] = ()  # distinct, ascending
    modules: tuple[str, ...] = ()  # distinct, in TARGET_MODULES order
    num_layers: int = 0  # layers with at least one module
    num_bytes: int = 0

    @property
    def is_sound(self) -> bool:
        return self.problem is None


def read_adapter(
    path: str,
    config: ModelConfig,
    *,
    max_rank: int = 256,
    root: str | None = None,
    dtype: str | None = None,
) -> AdapterWeights:
    """Read and check the adapter in directory `path` for a base model of `config`.

    Args:   max_rank: largest rank accepted. root: directory that the files must lie in, see
            `open_regular`. dtype: the dtype that A and scaling * B will be cast to ("float16",
            "bfloat16", "float32"); values that do not fit are refused.
    Raises: CheckpointNotFound: directory, config or weights missing. InvalidCheckpoint: damaged, or
            not made for this base. UnsupportedCheckpoint: asks for something that is not
            implemented. `field` is the config field or tensor at fault.
    """
    check_directory(path, root=root)
    peft = read_peft_config(path, num_layers=config.num_layers, root=root)
    with SafetensorsFile(_weights_file(path), root=root) as file:
        pairs = _place_tensors(file, config)
        check_targets(peft, config, pairs, file.path)
        modules = {
            key: _read_module(file, peft, config, key, pairs[key], max_rank, dtype)
            for key in sorted(pairs, key=lambda k: (k[0], TARGET_MODULES.index(k[1])))
        }
        file.check_unchanged()
    return AdapterWeights(
        path=path,
        version=_version(modules, dtype),
        modules=modules,
        max_rank=max(module.rank for module in modules.values()),
        base_model_name=peft.base_model_name,
    )


def check_adapter(
    path: str,
    config: ModelConfig,
    *,
    max_rank: int = 256,
    root: str | None = None,
    dtype: str | None = None,
) -> AdapterReport:
    """Load the adapter and report; a CheckpointError becomes `problem`, with the same message."""
    try:
        found = read_adapter(path, config, max_rank=max_rank, root=root, dtype=dtype)
    except CheckpointError as error:
        return AdapterReport(path, str(error), field=error.field)
    present = {module for _, module in found.modules}
    return AdapterReport(
        path,
        None,
        version=found.version,
        base_model_name=found.base_model_name,
        ranks=tuple(sorted({module.rank for module in found.modules.values()})),
        modules=tuple(module for module in TARGET_MODULES if module in present),
        num_layers=len({layer for layer, _ in found.modules}),
        num_bytes=found.num_bytes,
    )


def _weights_file(path: str) -> str:
    file = os.path.join(path, WEIGHTS_FILE)
    if os.path.lexists(file):
        return file
    pickles = [name for name in _PICKLES if os.path.lexists(os.path.join(path, name))]
    if pickles:
        raise UnsupportedCheckpoint(
            f"{path}: holds {pickles[0]} but no {WEIGHTS_FILE}; pickled weights are never opened; "
            f"{_CONVERT}",
            field=pickles[0],
        )
    raise CheckpointNotFound(f"{path}: holds no {WEIGHTS_FILE}", field=WEIGHTS_FILE)


def _place_tensors(
    file: SafetensorsFile, config: ModelConfig
) -> dict[tuple[int, str], dict[str, str]]:
    """(layer, module) -> {"A": tensor name, "B": tensor name}, for every tensor of the file."""
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    for name in file.names:
        parsed: TensorName = parse_tensor_name(name, config.num_layers, file.path)
        halves = pairs.setdefault((parsed.layer, parsed.module), {})
        if parsed.half in halves:
            raise InvalidCheckpoint(
                f"{file.path}: {shown(halves[parsed.half])} and {shown(name)} name the same weight",
                field=name,
            )
        halves[parsed.half] = name
    if not pairs:
        raise InvalidCheckpoint(
            f"{file.path}: holds no tensors; loading it would give the base model"
        )
    for (layer, module), halves in pairs.items():
        for half, other in (("A", "B"), ("B", "A")):
            if half not in halves:
                raise InvalidCheckpoint(
                    f"{file.path}: {module_path(layer, module)} has lora_{other} but no "
                    f"lora_{half}",
                    field=halves[other],
                )
    return pairs


def _read_module(
    file: SafetensorsFile,
    peft: PeftConfig,
    config: ModelConfig,
    key: tuple[int, str],
    names: Mapping[str, str],
    max_rank: int,
    dtype: str | None,
) -> LoraModule:
    """Check shapes before any bytes are read, then copy and check values."""
    path = module_path(*key)
    rank = check_shapes(file, peft, config, key, names)
    if rank > max_rank:
        raise InvalidCheckpoint(
            f"{file.path}: {path} has rank {rank} > max_rank {max_rank}: restart with "
            f"--max-rank {rank}",
            field="r",
        )
    scaling = peft.scaling_of(path)
    a, b = file.read_copy(names["A"]), file.read_copy(names["B"])
    check_values(a, 1.0, dtype, names["A"], file.path)
    check_values(b, scaling, dtype, names["B"], file.path)
    return LoraModule(a=a, b=b, scaling=scaling, rank=rank)


def _version(modules: Mapping[tuple[int, str], LoraModule], dtype: str | None) -> str:
    digest = hashlib.sha256(f"lora dtype={dtype}".encode())
    for (layer, name), module in modules.items():
        digest.update(f"|{layer}.{name} scaling={module.scaling.hex()}".encode())
        for half in (module.a, module.b):
            digest.update(f" {half.dtype.name}{half.shape}:".encode())
            digest.update(half.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
