"""A base model as a converted checkpoint, and back: `sloraj convert`, and what serves its output.

A converted checkpoint holds the engine's own parameters. They join tensors of the original device
by device (q, k and v; gate and up), so it fits the number of devices that it was made for, and no
other: in return each device restores its bytes and does nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from checkpoints.hf_config import read_model_config
from checkpoints.hf_weights import open_weights
from checkpoints.model_config import ModelConfig
from checkpoints.orbax_store import read_num_devices, restore_converted, save_converted
from sloraj.errors import ConfigError
from sloraj.model.weights import (
    Leaves,
    Progress,
    abstract_parameters,
    flatten,
    load_parameters,
    unflatten,
)
from sloraj.parallel.mesh import check_divisible, make_mesh


def convert(model: str, out: str, tp: int = 1, progress: Progress | None = None) -> None:
    """Write the Hugging Face directory `model` to the new directory `out`, for `tp` devices.

    Weights keep the dtype they are stored in. Works on the CPU, whatever devices there are, and
    needs host memory for one copy of the model. `out` appears when all is written, or not at all.
    Raises: ConfigError: `out` exists, or `tp` does not fit the model. CheckpointError: unusable
            files.
    """
    if os.path.lexists(out):
        raise ConfigError(f"out: got {out!r}, which exists, allowed: a new directory", param="out")
    config = read_model_config(model)
    check_divisible(config, tp)
    mesh = make_mesh(tp, _cpu_devices(tp))
    with open_weights(model, config) as weights:
        ends, layers = load_parameters(weights, config, mesh, None, progress or _no_progress)
    target = Path(out).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that one rename is all it takes to finish.
    unfinished = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        written = os.path.join(unfinished, target.name)
        save_converted(written, config, flatten(ends, layers), num_devices=tp, source=model)
        os.rename(written, target)
    finally:
        shutil.rmtree(unfinished)


def _cpu_devices(num_devices: int) -> list[jax.Device]:
    """As many as asked for, unless JAX runs already or was told how many: `make_mesh` says so."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", num_devices)
    return jax.devices("cpu")


def _no_progress(stage: str, done: int, total: int) -> None:
    """For callers who do not look."""


def restore(
    path: str, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[Leaves, list[Leaves]]:
    """What `sloraj.model.weights.load_parameters` would give for the original, in `dtype`.

    Raises: ConfigError: converted for another number of devices. CheckpointError: unusable files.
    """
    num_devices = read_num_devices(path)
    if num_devices != mesh.size:
        raise ConfigError(
            f"tensor_parallel_size: got {mesh.size}, allowed: {num_devices}, which {path} was "
            "converted for; convert the original again with another --tp",
            param="tensor_parallel_size",
        )
    return unflatten(
        restore_converted(path, abstract_parameters(config, mesh, dtype)), config.num_layers
    )
