"""An adapter added into the base's own weights when they are loaded: one model, nothing to add
later. It is what the paper's merged baselines serve.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from checkpoints.model_config import ModelConfig
from checkpoints.peft_adapter import AdapterWeights
from sloraj.errors import ConfigError
from sloraj.model.weights import Leaves

# parameter -> the modules whose rows it is made of, in order
_PARTS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def check_mergeable(tp: int, quantization: str | None) -> None:
    """Raise ConfigError where an adapter cannot be merged: rows dealt out, or held in a byte."""
    if tp != 1 or quantization is not None:
        raise ConfigError(
            f"merged_adapter: got tensor_parallel_size {tp} and quantization {quantization!r}, "
            f"allowed: 1 and none",
            param="merged_adapter",
        )


def merge_adapter(
    layers: list[Leaves], adapter: AdapterWeights, config: ModelConfig
) -> list[Leaves]:
    """W + scaling * B A of every module the adapter has; summed in float32, rounded once."""
    merged = []
    for index, leaves in enumerate(layers):
        found = dict(leaves)
        for name, modules in _PARTS.items():
            first = 0
            for module in modules:
                size = config.module_shape(module)[1]
                lora = adapter.modules.get((index, module))
                if lora is not None:
                    a, b = jnp.asarray(lora.a), jnp.asarray(lora.b)
                    found[name] = _add(found[name], a, b, lora.scaling, first=first)
                first += size
        merged.append(found)
    return merged


@functools.partial(jax.jit, static_argnames="first", donate_argnums=0)
def _add(weight: jax.Array, a: jax.Array, b: jax.Array, scaling: float, *, first: int) -> jax.Array:
    """Rows `[first, first + len(b))` of weight `[out, in]` are the module's; b `[.., rank]`."""
    delta = jnp.einsum(
        "or,ri->oi", b.astype(jnp.float32), a.astype(jnp.float32), precision="highest"
    )
    rows = jax.lax.dynamic_slice_in_dim(weight, first, b.shape[0], axis=0)
    rows = (rows.astype(jnp.float32) + jnp.float32(scaling) * delta).astype(weight.dtype)
    return jax.lax.dynamic_update_slice_in_dim(weight, rows, first, axis=0)
