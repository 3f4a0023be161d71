"""Weight-only quantisation in plain float64 numpy: what the engine's quantised weights stand for.

Shares no code and no float8 type with the engine: float8_e4m3fn is spelled out bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def e4m3_values() -> Float:
    """The finite values of float8_e4m3fn from 0 up: 4 bits of exponent (bias 7), 3 of mantissa."""
    values = []
    for bits in range(127):  # 127 is NaN
        exponent, mantissa = divmod(bits, 8)
        values.append(
            mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7)
        )
    return np.array(values)


def nearest_e4m3(x: Float) -> Float:
    """Each value's nearest in e4m3; of two as near, the one of even mantissa."""
    values = e4m3_values()
    above = np.clip(np.searchsorted(values, np.abs(x)), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    middle = (low + high) / 2
    is_high = (np.abs(x) > middle) | ((np.abs(x) == middle) & (above % 2 == 0))
    return np.sign(x) * np.where(is_high, high, low)


def quantized(weight: NDArray[Any], quantization: str) -> tuple[Float, Float]:
    """weight `[out, in]` -> (whole or e4m3 numbers `[out, in]`, scale `[out]`)."""
    wide = np.asarray(weight, np.float64)
    largest = np.abs(wide).max(axis=1)
    top = {"int8": 127.0, "fp8": 448.0}[quantization]
    scale = np.where(largest > 0, largest / top, 1.0).astype(np.float32).astype(np.float64)
    shares = (wide.astype(np.float32) / scale[:, None].astype(np.float32)).astype(np.float64)
    return (np.rint(shares) if quantization == "int8" else nearest_e4m3(shares)), scale


def dequantized(weights: Mapping[str, NDArray[Any]], quantization: str) -> dict[str, Float]:
    """A model's weights, with each layer's linear ones as their quantised form reads."""
    found = {}
    for name, weight in weights.items():
        found[name] = np.asarray(weight, np.float64)
        if name.endswith(tuple(f"{module}.weight" for module in LINEAR)):
            numbers, scale = quantized(weight, quantization)
            found[name] = numbers * scale[:, None]
    return found
