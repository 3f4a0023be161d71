"""Linear layers that are measured: their shapes, their compiled programs, and the time these take.

Many calls in one program, each on another weight, so that caches are as cold as in a step. A time
is that of the kernels themselves, from a profiler trace: a product of one byte and one row ends
sooner than an output of its own is allocated.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernel_timing import WARM_UPS
from bench.profile_step import module_seconds
from pallas_kernels import linear_mosaic as mosaic
from pallas_kernels import linear_triton as triton
from pallas_kernels.linear import linear, tuning_key

SHAPES = {  # (out, in)
    "7b.qkv": (12288, 4096),
    "o": (4096, 4096),
    "7b.gate_up": (22016, 4096),
    "7b.down": (4096, 11008),
    "8b.qkv": (6144, 4096),
    "8b.gate_up": (28672, 4096),
    "8b.down": (4096, 14336),
}
DTYPES = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
ROTATED_BYTES = 600e6  # weights that calls rotate over: ten times the last-level cache
REPEATS = 4  # of a program in a profile
Config = triton.Config | mosaic.Config


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape with one way to compute it; config None: XLA."""

    shape: str
    dtype: str
    num_rows: int
    config: Config | None

    @property
    def sizes(self) -> tuple[int, int]:
        return SHAPES[self.shape]

    @property
    def weight_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 1

    @property
    def key(self) -> str:
        return tuning_key(self.num_rows, *self.sizes, self.weight_bytes)

    @property
    def num_calls(self) -> int:
        return max(3, min(24, math.ceil(ROTATED_BYTES / self.weight_bytes / math.prod(self.sizes))))

    @property
    def implementation(self) -> str:
        if self.config is None:
            return "xla"
        return "mosaic" if isinstance(self.config, mosaic.Config) else "triton"

    @property
    def name(self) -> str:
        """Of the compiled program, in a profile."""
        return "linear_" + hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def compile(self) -> Any:
        out_size, in_size = self.sizes
        weight = jax.ShapeDtypeStruct((out_size, in_size), DTYPES[self.dtype])

        @jax.jit
        def call(weight: jax.Array, x: jax.Array, scale: jax.Array) -> jax.Array:
            return linear(
                x, weight, None if self.dtype == "bfloat16" else scale,
                implementation=self.implementation, config=self.config,
            )  # fmt: skip

        def run(weights: list[Any], shared: tuple[Any, ...]) -> list[jax.Array]:
            return [call(*weight, *shared) for weight in weights]

        run.__name__ = self.name
        shared = (
            jax.ShapeDtypeStruct((self.num_rows, in_size), jnp.bfloat16),
            jax.ShapeDtypeStruct((out_size,), jnp.float32),
        )
        return jax.jit(run).lower([(weight,)] * self.num_calls, shared).compile()


def describe(case: Case) -> str:
    """A case's way in a word."""
    config = case.config
    if config is None:
        return "xla"
    sizes = f"{config.block_out}x{config.block_in}/{config.split_in} st{config.num_stages}"
    if isinstance(config, triton.Config):
        return f"t{sizes} w{config.num_warps}"
    chunk = f" c{config.chunk_in}" if config.chunk_in else ""
    return f"m{config.num_groups}*{sizes} b{config.num_beside}{'' if config.swap else ' ns'}{chunk}"


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Alone on the device, as far as tuners go that name the same file."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_all(found: list[Case], args: argparse.Namespace, started: float) -> list[Any]:
    """(case, program) of those that compile within `--compile-s`; XLA's, which tune, alone."""

    def compile_one(case: Case) -> Any:
        if time.monotonic() - started > args.compile_s:
            return "no time to compile"
        try:
            return case.compile()
        except Exception as error:  # one candidate that the compiler refuses ends no search
            return (str(error) or repr(error)).splitlines()[0][:150]

    kernels = [case for case in found if case.config is not None]
    with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
        done = list(zip(kernels, pool.map(compile_one, kernels), strict=True))
    plain = [case for case in found if case.config is None]
    with locked(args.lock if plain else None):
        done += [(case, compile_one(case)) for case in plain]
    for case, program in done:
        if isinstance(program, str):
            print(f"not timed: {case}: {program}", flush=True)
    return [(case, program) for case, program in done if not isinstance(program, str)]


def make_weights(shape: str, dtype: str, count: int) -> list[tuple[jax.Array]]:
    @jax.jit
    def make(seed: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.key(seed), SHAPES[shape], jnp.uint8)
        signed = jax.lax.bitcast_convert_type(bits, jnp.int8)
        if dtype == "int8":
            return signed
        return (signed.astype(jnp.bfloat16) / 64).astype(DTYPES[dtype])

    return [(make(jnp.int32(seed)),) for seed in range(count)]


def watch(beat: list[Any], seconds: float) -> None:
    """End the process, and free its lock, when what `beat` names takes longer than that."""

    def look() -> None:
        while True:
            time.sleep(0.5)
            if beat[1] is not None and time.monotonic() - beat[0] > seconds:
                print(f"hangs: {beat[1]}", flush=True)
                os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def time_all(
    programs: list[Any], args: argparse.Namespace, started: float
) -> Iterator[list[dict[str, Any]]]:
    """Times of the programs of one weight after the other, checked against float64."""
    beat: list[Any] = [0.0, None]
    watch(beat, args.hang_s)
    for shape, dtype in dict.fromkeys((case.shape, case.dtype) for case, _ in programs):
        mine = [(c, p) for c, p in programs if (c.shape, c.dtype) == (shape, dtype)]
        with locked(args.lock):
            if time.monotonic() - started > args.stop_s:
                print(f"not timed: {shape} {dtype}: no time", flush=True)
                continue
            weights = make_weights(shape, dtype, max(case.num_calls for case, _ in mine))
            scale = jnp.linspace(0.5, 1.5, SHAPES[shape][0], dtype=jnp.float32)
            some = slice(0, None, SHAPES[shape][0] // 64)  # output features that are checked
            few = np.asarray(weights[0][0][some].astype(jnp.float32), np.float64)
            few *= 1.0 if dtype == "bfloat16" else np.asarray(scale, np.float64)[some, None]
            checked = []
            for case, program in mine:
                beat[:] = [time.monotonic(), case]
                checked.append(check_case(case, program, weights, scale, few, some))
            beat[:] = [time.monotonic(), f"a profile of {len(mine)} programs"]
            results = time_cases(checked, dict(mine), weights, scale)
            beat[1] = None
            del weights
        yield results


def check_case(
    case: Case, program: Any, weights: list[Any], scale: jax.Array, few: np.ndarray, some: slice
) -> dict[str, Any]:
    """The case, its input, and how far its answer is from float64."""
    x = np.random.default_rng(0).normal(size=(case.num_rows, case.sizes[1])).astype(jnp.bfloat16)
    calls, shared = weights[: case.num_calls], (jnp.asarray(x), scale)
    for _ in range(WARM_UPS):
        y = np.asarray(program(calls, shared)[0])[:, some].astype(np.float64)
    want = x.astype(np.float64) @ few.T
    return {
        "case": case,
        "x": shared[0],
        "error": float(np.abs(y - want).max() / np.abs(want).max()),
    }


def time_cases(
    checked: list[dict[str, Any]], programs: dict[Case, Any], weights: list[Any], scale: jax.Array
) -> list[dict[str, Any]]:
    """Microseconds a call of each, all in one trace."""

    def run() -> None:
        for entry in checked * REPEATS:
            case = entry["case"]
            jax.block_until_ready(programs[case](weights[: case.num_calls], (entry["x"], scale)))

    seconds = module_seconds(run)
    results = []
    for entry in checked:
        case = entry["case"]
        us = seconds[f"jit_{case.name}"] / REPEATS / case.num_calls * 1e6
        print(f"  {case.shape} {case.dtype} {case.num_rows} {describe(case)} {us:.1f}", flush=True)
        results.append({"case": case, "us": us, "error": entry["error"]})
    return results
