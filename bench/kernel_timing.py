"""Time of a kernel as a step sees it: many calls unrolled in one program, each on other inputs.

One program is one CUDA graph, so what is timed is the device's work with the graph's gaps between
kernels, not Python's dispatch. Inputs rotate, so that caches are as cold as in a step, where every
layer reads weights of its own: give inputs that together exceed the last-level cache several times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

WARM_UPS = 4  # the first runs of a program are not captured in a graph
ENQUEUED = 8  # programs under way at once, so that dispatch hides behind the device


def compile_calls(
    call: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    num_calls: int,
    shared: tuple[Any, ...] = (),
    name: str = "run",
) -> Any:
    """A compiled program of `num_calls` calls `call(*inputs[i % len(inputs)], *shared)`.

    In a profile it is called `jit_` and the name.
    """

    def run(inputs: list[Any], shared: tuple[Any, ...]) -> list[Any]:
        return [call(*inputs[i % len(inputs)], *shared) for i in range(num_calls)]

    # A call that only reads gives the same result for the same inputs: no more calls than inputs,
    # or XLA computes them once.
    if num_calls > len(inputs):
        raise ValueError(f"num_calls: got {num_calls}, allowed: at most {len(inputs)} inputs")
    run.__name__ = name
    return jax.jit(run).lower(list(inputs), shared).compile()


def time_compiled(
    program: Any,
    inputs: Sequence[Any],
    *,
    num_calls: int,
    shared: tuple[Any, ...] = (),
    repeats: int = 5,
) -> float:
    """Seconds a call: the median over `repeats` of programs enqueued back to back."""
    arguments = (list(inputs), shared)
    for _ in range(WARM_UPS):
        jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        results = [program(*arguments) for _ in range(ENQUEUED)]
        jax.block_until_ready(results)
        seconds.append((time.perf_counter() - started) / ENQUEUED / num_calls)
    return float(np.median(seconds))


def time_calls(
    call: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    shared: tuple[Any, ...] = (),
    repeats: int = 5,
) -> float:
    """Seconds a call of `call(*inputs[i], *shared)`, one call for each of the inputs.

    For calls in place (an output that aliases an input) see `time_chain`.
    """
    num_calls = len(inputs)
    program = compile_calls(call, inputs, num_calls=num_calls, shared=shared)
    return time_compiled(program, inputs, num_calls=num_calls, shared=shared, repeats=repeats)


def time_chain(
    call: Callable[..., Any],
    carry: Any,
    inputs: Sequence[Any],
    *,
    repeats: int = 5,
) -> float:
    """Seconds a call of `carry = call(carry, *inputs[i])`; carry is donated and updated in place.

    `carry` is given up. What it holds should not grow without bound over some hundred calls.
    """

    def run(carry: Any, inputs: list[Any]) -> Any:
        for one in inputs:
            carry = call(carry, *one)
        return carry

    program = jax.jit(run, donate_argnums=0).lower(carry, list(inputs)).compile()
    return time_compiled_chain(program, carry, (list(inputs),), len(inputs), repeats=repeats)


def time_compiled_chain(
    program: Any, carry: Any, arguments: tuple[Any, ...], num_calls: int, *, repeats: int = 5
) -> float:
    """Seconds a call of a program `carry -> carry` of `num_calls` calls, which donates carry."""
    for _ in range(WARM_UPS):
        carry = program(carry, *arguments)
    jax.block_until_ready(carry)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(ENQUEUED):
            carry = program(carry, *arguments)
        jax.block_until_ready(carry)
        seconds.append((time.perf_counter() - started) / ENQUEUED / num_calls)
    return float(np.median(seconds))
