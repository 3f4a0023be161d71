"""From checkpoint tensors to sharded device arrays, one parameter at a time.

Each device is sent only the slices that the sharding table gives it, straight from the
memory-mapped file; joining and casting happen on the device, so no second host copy of the model
exists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from checkpoints.model_config import ModelConfig
from sloraj.model.quantize import quantize, quantize_layer
from sloraj.parallel.sharding import QUANTIZED, ParamRule, Piece, layer_rules, top_rules

Leaves = dict[str, jax.Array]
Progress = Callable[[str, int, int], None]


class TensorSource(Protocol):
    """A base model's tensors by name (`checkpoints.hf_weights.HfWeights`)."""

    def read(self, name: str) -> np.ndarray: ...


def load_parameters(
    source: TensorSource,
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype | None,
    progress: Progress,
    quantization: str | None = None,
) -> tuple[Leaves, list[Leaves]]:
    """(parameters outside the layers, one dict a layer), on the mesh; dtype None: as stored.

    With `quantization` each layer's linear weights are quantised from what is stored, once the
    layer is on the devices.
    """
    total = config.num_layers + 1
    ends = _load(source, top_rules(config, mesh.size), mesh, dtype)
    progress("weights", 1, total)
    layers = []
    for index in range(config.num_layers):
        rules = layer_rules(config, mesh.size, index)
        if quantization is None:
            layers.append(_load(source, rules, mesh, dtype))
        else:
            stored = {name: rules.pop(name) for name in QUANTIZED}
            layer = _load(source, rules, mesh, dtype) | _load(source, stored, mesh, None)
            layers.append(quantize_layer(layer, quantization))
        progress("weights", index + 2, total)
    return ends, layers


def _load(
    source: TensorSource, rules: dict[str, ParamRule], mesh: Mesh, dtype: jnp.dtype | None
) -> Leaves:
    leaves = {name: _load_one(source, rule, mesh, dtype) for name, rule in rules.items()}
    # The mapped file's pages must stay readable until every copy has been made.
    jax.block_until_ready(leaves)
    return leaves


def _load_one(
    source: TensorSource, rule: ParamRule, mesh: Mesh, dtype: jnp.dtype | None
) -> jax.Array:
    shards = []
    for index, device in enumerate(mesh.devices.flat):
        pieces = [
            jax.device_put(part, device)
            for piece in rule.pieces(index)
            for part in _host_parts(source, piece)
        ]
        shards.append(_join(pieces, dtype=dtype or _common_dtype(pieces)))
    return jax.make_array_from_single_device_arrays(
        rule.global_shape(mesh.size), NamedSharding(mesh, rule.spec), shards
    )


def _common_dtype(pieces: list[jax.Array]) -> jnp.dtype:
    """The stored dtype; for pieces of several, the one that holds them all."""
    return jnp.dtype(jnp.result_type(*pieces))


def _host_parts(source: TensorSource, piece: Piece) -> list[np.ndarray]:
    tensor = source.read(piece.tensor)
    part = tensor if piece.rows is None else tensor[piece.rows]
    part = part if piece.columns is None else part[:, piece.columns]
    parts = [np.ascontiguousarray(part)] if part.shape[0] or not piece.pad_rows else []
    if piece.pad_rows:
        parts.append(np.zeros((piece.pad_rows, *tensor.shape[1:]), tensor.dtype))
    return parts


@functools.partial(jax.jit, static_argnames="dtype")
def _join(pieces: list[jax.Array], *, dtype: jnp.dtype) -> jax.Array:
    # The copy is asked for: on CPU a lone piece may alias the mapped file.
    return jnp.copy(jnp.concatenate([p.astype(dtype) for p in pieces], axis=0))


def abstract_parameters(
    config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, quantization: str | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter's shape and sharding by flat name (`embed`, `layers.3.qkv`, ...)."""
    return {
        name: jax.ShapeDtypeStruct(
            rule.global_shape(mesh.size),
            jnp.dtype(rule.dtype or dtype),
            sharding=NamedSharding(mesh, rule.spec),
        )
        for name, rule in flat_rules(config, mesh.size, quantization).items()
    }


def flat_rules(
    config: ModelConfig, tp: int, quantization: str | None = None
) -> dict[str, ParamRule]:
    rules = dict(top_rules(config, tp))
    for index in range(config.num_layers):
        layer = layer_rules(config, tp, index, quantization)
        rules |= {f"layers.{index}.{name}": rule for name, rule in layer.items()}
    return rules


def flatten(ends: Leaves, layers: list[Leaves]) -> Leaves:
    return ends | {f"layers.{i}.{n}": v for i, leaf in enumerate(layers) for n, v in leaf.items()}


def unflatten(flat: Leaves, num_layers: int) -> tuple[Leaves, list[Leaves]]:
    layers: list[Leaves] = [{} for _ in range(num_layers)]
    ends: Leaves = {}
    for name, value in flat.items():
        if name.startswith("layers."):
            _, index, leaf = name.split(".")
            layers[int(index)][leaf] = value
        else:
            ends[name] = value
    return ends, layers


def random_parameters(
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    seed: int,
    quantization: str | None = None,
) -> tuple[Leaves, list[Leaves]]:
    """Random weights made on the device, for benchmarks of large geometries (norms are ones)."""

    @functools.partial(jax.jit, static_argnames=("shape", "sharding"))
    def normal(key: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
        drawn = jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)
        placed: jax.Array = jax.lax.with_sharding_constraint(drawn, sharding)
        return placed

    key = jax.random.key(seed)
    flat = {}
    for index, (name, leaf) in enumerate(abstract_parameters(config, mesh, dtype).items()):
        if "norm" in name:
            flat[name] = jax.device_put(jnp.ones(leaf.shape, dtype), leaf.sharding)
        else:
            flat[name] = normal(jax.random.fold_in(key, index), leaf.shape, leaf.sharding)
            if quantization is not None and name.rpartition(".")[2] in QUANTIZED:
                flat[name], flat[f"{name}_scale"] = quantize(flat.pop(name), quantization)
    return unflatten(flat, config.num_layers)
