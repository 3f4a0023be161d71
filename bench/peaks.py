"""The best rates of the device at hand, beside which floors are judged (`bench.floors`)."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from bench.floors import FLOPS_PER_S, READ_BYTES_PER_S, Peaks


def measure_peaks() -> Peaks:
    """The rates of the default device, never below those of `bench.floors`."""
    keys = jax.random.split(jax.random.key(0), 9)  # constants draw less power and run faster
    parts = [jax.random.normal(key, (1 << 28,), jnp.bfloat16) for key in keys[1:]]  # 512 MB each
    read = jax.jit(lambda xs: [jnp.sum(x, dtype=jnp.float32) for x in xs])
    read_s = _best_s(read, parts)
    square = jax.random.normal(keys[0], (8192, 8192), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    flops_s = _best_s(multiply, square)
    return Peaks(
        read_bytes_per_s=max(READ_BYTES_PER_S, sum(x.nbytes for x in parts) / read_s),
        flops_per_s=max(FLOPS_PER_S, 2 * 8192**3 / flops_s),
    )


def _best_s(program: Any, argument: Any, repeats: int = 5, enqueued: int = 8) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready([program(argument) for _ in range(enqueued)])
        best = min(best, (time.perf_counter() - started) / enqueued)
    return best
