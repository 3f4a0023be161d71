"""Weight-only quantisation: a linear weight in one byte an element, with a scale a row.

Symmetric, to the nearest: `weight[n, k]` is stored as `q[n, k] = round(weight[n, k] / scale[n])`
and read as `q[n, k] * scale[n]`. The scale of an output feature brings its largest weight to the
largest value of the type, so it can be applied to the product, after the sum.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sloraj.parallel.sharding import COLUMN, QUANTIZED, QUANTIZED_DTYPES, ROW, WHOLE

LARGEST = {"int8": 127.0, "fp8": 448.0}  # of float8_e4m3fn, which has no infinity


def quantize_rows(weight: jax.Array, quantization: str) -> tuple[jax.Array, jax.Array]:
    """weight `[out, in]` -> (one byte an element `[out, in]`, f32 `[out]`); zero rows stay zero."""
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1)
    scale = largest / jnp.float32(LARGEST[quantization])
    scale = jnp.where(scale > 0, scale, jnp.float32(1))
    shares = jnp.clip(wide / scale[:, None], -LARGEST[quantization], LARGEST[quantization])
    dtype = jnp.dtype(QUANTIZED_DTYPES[quantization])
    # The cast to float8 rounds to the nearest by itself, the cast to int8 would cut.
    shares = jnp.round(shares) if quantization == "int8" else shares
    return shares.astype(dtype), scale


def quantize(weight: jax.Array, quantization: str) -> tuple[jax.Array, jax.Array]:
    """`quantize_rows` of a weight on the mesh, where it lies.

    Where the columns are split, the scale is of the whole row: the same on any number of devices.
    """
    sharding = weight.sharding
    assert isinstance(sharding, NamedSharding)
    scale_spec = WHOLE if sharding.spec == ROW else COLUMN
    program = _program(quantization, sharding, NamedSharding(sharding.mesh, scale_spec))
    quantized: tuple[jax.Array, jax.Array] = program(weight)
    return quantized


@functools.cache
def _program(quantization: str, sharding: NamedSharding, scale: NamedSharding) -> Any:
    return jax.jit(
        functools.partial(quantize_rows, quantization=quantization),
        out_shardings=(sharding, scale),
    )


def quantize_layer(leaves: dict[str, jax.Array], quantization: str) -> dict[str, jax.Array]:
    """One layer's parameters with its linear weights quantised. Takes them out of `leaves`, so
    that no more than one layer exists twice.
    """
    found = {}
    for name in QUANTIZED:
        found[name], found[f"{name}_scale"] = quantize(leaves.pop(name), quantization)
    return leaves | found
