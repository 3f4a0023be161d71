"""Residual addition and the norm of its sum, in one pass over the activations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.dispatch import unknown_implementation
from pallas_kernels.triton_blocks import Ref, next_power_of_2, triton_call

ELEMENTS_PER_WARP = 1024


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis; weight is `[features]`."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(eps))
    return (wide * scale).astype(x.dtype) * jnp.broadcast_to(weight, x.shape)


def add_lora(base: jax.Array, lora: jax.Array | None) -> jax.Array:
    """A base output `[T, D]` and what adapters add to its first rows, f32: one rounding."""
    if lora is None:
        return base
    first = (base[: len(lora)].astype(jnp.float32) + lora).astype(base.dtype)
    if len(lora) == len(base):
        return first
    return jax.lax.dynamic_update_slice_in_dim(base, first, 0, axis=0)


def check_lora(lora: jax.Array | None, base: jax.Array) -> None:
    """Raise ValueError unless lora can be added to base's first rows."""
    if lora is None:
        return
    is_fitting = lora.ndim == 2 and len(lora) <= len(base) and lora.shape[1] == base.shape[1]
    if lora.dtype != jnp.float32 or not is_fitting:
        raise ValueError(
            f"lora {lora.dtype} {lora.shape} is not float32 {base.shape} or fewer rows"
        )


def add_rms_norm_reference(
    x: jax.Array, delta: jax.Array, lora: jax.Array | None, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The specification of `add_rms_norm`."""
    total = x + add_lora(delta, lora)
    return total, rms_norm(total, weight, eps)


def _kernel(
    x_ref: Ref, delta_ref: Ref, lora_ref: Ref | None, weight_ref: Ref, total_ref: Ref,
    normed_ref: Ref, *, eps: float,
) -> None:  # fmt: skip
    width, row = x_ref.shape[1], pl.program_id(0)
    column = jnp.arange(next_power_of_2(width), dtype=jnp.int32)
    is_real = column < width
    where = (jnp.full_like(column, row), column)

    def load(ref: Ref, mask: jax.Array = is_real) -> jax.Array:
        value: jax.Array = pltriton.load(ref.at[where], mask=mask, other=0)
        return value.astype(jnp.float32)

    delta = load(delta_ref)
    if lora_ref is not None:
        lora = load(lora_ref, is_real & (row < lora_ref.shape[0]))
        delta = (delta + lora).astype(x_ref.dtype).astype(jnp.float32)
    total = (load(x_ref) + delta).astype(x_ref.dtype)
    pltriton.store(total_ref.at[where], total, mask=is_real)
    wide = total.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(wide * wide) / width + jnp.float32(eps))
    weight = pltriton.load(weight_ref.at[column], mask=is_real, other=0)
    normed = (wide * scale).astype(x_ref.dtype) * weight
    pltriton.store(normed_ref.at[where], normed, mask=is_real)


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array,
    weight: jax.Array,
    eps: float,
    lora: jax.Array | None = None,
    *,
    implementation: str,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The sum of a residual stream and what is added to it, and the RMS norm of the sum.

    Semantics: total = x + round(delta + lora), rounded to x's dtype;
               normed = (total / sqrt(mean(total ** 2) + eps)), rounded, times weight.
    Args:      x, delta: `[T, D]`, of one dtype. weight: `[D]`, of the same.
               lora: f32 `[at most T, D]`, what adapters add to delta's first rows; None: nothing.
    Returns:   (total, normed), both `[T, D]`.
    Raises:    ValueError: shapes or dtypes disagree, or the implementation is unknown.
    Source:    RMSNorm (arXiv:1910.07467), rounded as Hugging Face's LlamaRMSNorm does.
    """
    if not x.shape == delta.shape or weight.shape != x.shape[1:]:
        raise ValueError(f"x {x.shape}, delta {delta.shape} and weight {weight.shape} disagree")
    check_lora(lora, x)
    if not x.dtype == delta.dtype == weight.dtype:
        raise ValueError(f"x {x.dtype}, delta {delta.dtype} and weight {weight.dtype} disagree")
    if implementation == "xla":
        return add_rms_norm_reference(x, delta, lora, weight, eps)
    if implementation == "triton":
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        warps = next_power_of_2(x.shape[1]) // ELEMENTS_PER_WARP
        total, normed = triton_call(
            functools.partial(_kernel, eps=eps),
            (out, out),
            name="add_rms_norm",
            grid=(x.shape[0],),
            num_warps=min(max(warps, 1), 8),
            num_stages=1,
            interpret=interpret,
        )(x, delta, lora, weight)
        return total, normed
    raise unknown_implementation(implementation)
