"""How far an answer may be from its float64 oracle, in one place."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

ACCUMULATION = 1e-5  # of the largest answer: what adding in f32 costs
ROUNDING = {  # of each answer: what one rounding to the type costs
    np.dtype(np.float32): 1e-6,
    np.dtype(np.float16): 2.0**-11,
    np.dtype(jnp.bfloat16): 2.0**-8,
}


def tensor_core_accumulation(depth: int) -> float:
    """What adding `depth` products on tensor cores costs, of the largest answer.

    They truncate the running sum to f32 once for every 16 products, always towards zero.
    """
    return max(ACCUMULATION, depth / 16 * 2.0**-23)


def assert_close(
    got: Any, want: np.ndarray, *, inner: Any = np.float32, accumulation: float = ACCUMULATION
) -> None:
    """Each answer within one rounding to its type, plus the accumulation error.

    `inner` is the type of factors that the algorithm itself rounds (softmax weights).
    """
    got = np.asarray(got)
    error = np.abs(got.astype(np.float64) - want)
    largest = float(np.max(np.abs(want), initial=0.0))
    inner_error = 0.0 if inner == np.float32 else ROUNDING[np.dtype(inner)]
    allowed = ROUNDING[got.dtype] * np.abs(want) + (accumulation + inner_error) * largest
    worst = np.unravel_index(np.argmax(error - allowed), error.shape) if error.size else ()
    assert not np.isnan(error).any(), "the answer has NaNs"
    assert (error <= allowed).all(), (
        f"at {worst}: got {got[worst]}, want {want[worst]}, allowed error {allowed[worst]}"
    )
