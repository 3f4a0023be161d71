"""The device mesh: one axis, `tp`. One device is a mesh of one."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from checkpoints.model_config import ModelConfig
from sloraj.errors import ConfigError

AXIS = "tp"


def make_mesh(tp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the first `tp` devices. Raises ConfigError when there are fewer."""
    devices = jax.devices() if devices is None else devices
    if len(devices) < tp:
        raise ConfigError(
            f"tensor_parallel_size: got {tp}, allowed: up to {len(devices)}, the devices present",
            param="tensor_parallel_size",
        )
    return Mesh(np.array(devices[:tp]), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(config: ModelConfig, tp: int) -> None:
    """Raises ConfigError when the model cannot be split over `tp` devices."""

    def refuse(what: str, size: int) -> None:
        raise ConfigError(
            f"tensor_parallel_size: got {tp}, allowed: a divisor of the model's {what} ({size})",
            param="tensor_parallel_size",
        )

    for what, size in (
        ("num_attention_heads", config.num_heads),
        ("intermediate_size", config.intermediate_size),
        ("hidden_size", config.hidden_size),
    ):
        if size % tp:
            refuse(what, size)
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        refuse("num_key_value_heads, or a multiple of it", config.num_kv_heads)


def local_kv_heads(config: ModelConfig, tp: int) -> int:
    """kv heads a device: its share, or one repeated head when there are fewer heads than
    devices.
    """
    return max(1, config.num_kv_heads // tp)
