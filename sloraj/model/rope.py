"""Rotary position embedding: frequencies by scaling type, and their application.

Sources: transformers `modeling_rope_utils` for the meaning of each config field; YaRN
(arXiv:2309.00071); Llama 3.1's wavelength-dependent scaling.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.model_config import ModelConfig, RopeConfig


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """(inverse frequencies f32 [head_dim / 2], factor on cos and sin).

    `dynamic` equals the unscaled embedding up to the original context, which is as far as a cache
    of rotated keys can follow it: `max_context` bounds max_model_len accordingly.
    """
    rope, dim = config.rope, config.head_dim
    inverse = rope.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.rope_type == "linear":
        return (inverse / rope.factor).astype(np.float32), 1.0
    if rope.rope_type == "llama3":
        return _llama3(inverse, rope, config).astype(np.float32), 1.0
    if rope.rope_type == "yarn":
        frequencies, factor = _yarn(inverse, rope, config)
        return frequencies.astype(np.float32), factor
    return inverse.astype(np.float32), 1.0


def max_context(config: ModelConfig) -> int:
    """Longest sequence that the position embedding supports."""
    if config.rope.rope_type == "dynamic":
        original = config.rope.original_max_position_embeddings
        return min(original or config.max_position_embeddings, config.max_position_embeddings)
    return config.max_position_embeddings


def _llama3(inverse: np.ndarray, rope: RopeConfig, config: ModelConfig) -> np.ndarray:
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    wavelength = 2 * math.pi / inverse
    low, high = original / rope.low_freq_factor, original / rope.high_freq_factor
    smooth = (original / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = np.where(wavelength > low, inverse / rope.factor, blended)
    return np.where(wavelength < high, inverse, scaled)


def _yarn(inverse: np.ndarray, rope: RopeConfig, config: ModelConfig) -> tuple[np.ndarray, float]:
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    dim = config.head_dim

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if rope.attention_factor is not None:
        factor = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        factor = mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    else:
        factor = mscale(rope.factor)

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    return inverse / rope.factor * ramp + inverse * (1 - ramp), float(factor)


def rotation(
    positions: jax.Array, inverse: np.ndarray, factor: float
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, f32 `[T, head_dim / 2]`, for positions i32 `[T]`."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inverse)[None, :]
    scale = jnp.float32(factor)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale
