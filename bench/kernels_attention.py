"""Paged attention on real shapes against its floors, on the default device.

    python -m bench.kernels_attention --out results/kernels-attention.json

Decoding, prefill with and without a cached prefix, and mixed steps, for Llama-7B (MHA) and
Llama-3.1-8B (GQA-4) in bfloat16. One call is one layer. A model's batches read one pool, and rows
have room for 4,096 tokens or for 32,768, so that batches of as many rows share a program; programs
are compiled a few at a time, and none while another is timed. Times are of kernels, from a profiler
trace (what a step adds between kernels is in `bench.step`).
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.attention_cases import Batch, attend, make_inputs, random_pool
from bench.floors import Peaks, limit_s
from bench.kernel_timing import compile_calls
from bench.peaks import measure_peaks
from bench.profile_step import module_kernels, seconds_of_runs
from bench.record import command, commit, record
from bench.summary import target, worst_target
from pallas_kernels.dispatch import KernelShape, resolve_kernels
from pallas_kernels.shapes import MODELS
from sloraj.build import BLOCK_Q

DECODE_SHARE = {"llama-7b": 0.9, "llama-3.1-8b": 0.8}  # of read bandwidth
PREFILL_SHARE = 0.6  # of the matmul rate
POOL_BYTES = 36e9  # the largest batch's keys and values
MAX_LENGTHS = (4096, 32768)  # that rows have room for
BATCHES = (1, 8, 64, 256)  # 8 rows run in the bucket of 16
CONTEXTS = (128, 512, 2048, 8192, 32768)
FIRST = ("decode 64 x 512", "prefill 8192", "decode 64 x 525")  # should time run out
PROMPTS = (512, 2048, 8192)
LONG_PREFILL = 8192  # tokens, those cached included
NUM_INPUTS = {1: 16, 16: 16, 64: 4, 256: 2}  # to rotate, by rows: together more than the caches
NUM_PREFILL_INPUTS = 4
GROUP = 12  # programs that are compiled before those that are ready are measured
COMPILERS = 12  # threads
REPEATS = 3  # of a program in a profile


def decode_batches(model: str) -> list[Batch]:
    batches = [
        Batch(
            name=f"decode {rows} x {context}",
            model=model,
            contexts=(context,) * rows,
            num_padding=8 if rows == 8 else 0,
            max_length=next(length for length in MAX_LENGTHS if context <= length),
        )
        for rows in BATCHES
        for context in CONTEXTS
    ]
    short, long = MAX_LENGTHS
    spread = tuple(np.random.default_rng(0).integers(16, short, size=64).tolist())
    others: list[tuple[str, tuple[int, ...], int]] = [
        ("64 x 525", (525,) * 64, short),
        ("64 x 16..4096", spread, short),
        ("63 x 512 and 32768", (long, *(512,) * 63), long),
    ]
    batches += [
        Batch(name=f"decode {name}", model=model, contexts=contexts, max_length=max_length)
        for name, contexts, max_length in others
    ]
    return [batch for batch in batches if batch.kv_bytes < POOL_BYTES]


def prefill_batches(model: str) -> list[Batch]:
    alone = [Batch(name=f"prefill {new}", model=model, chunks=((0, new),)) for new in PROMPTS]
    rows = (512,) * 60
    return [
        *alone,
        Batch(name="prefill 4 x 512", model=model, chunks=((0, 512),) * 4),
        Batch(name="prefill 2048 after 14336", model=model, chunks=((14336, 2048),)),
        Batch(name="prefill 512 after 15872", model=model, chunks=((15872, 512),)),
        Batch(name="mixed 60 x 512, 452", model=model, contexts=rows, chunks=((0, 452),)),
        Batch(name="mixed 60 x 512, 1988", model=model, contexts=rows, chunks=((0, 1988),)),
        Batch(
            name="prefill 2048, 256 rows unused", model=model, chunks=((0, 2048),), num_padding=256
        ),
    ]


def chosen_kernels(model: str, implementation: str | None) -> tuple[str, str]:
    """The implementations of decode and ragged attention: one for both, or what an engine takes."""
    if implementation is not None:
        return implementation, implementation
    device, shape = jax.devices()[0], MODELS[model]
    kernels = resolve_kernels(
        None,
        platform=device.platform,
        device_kind=device.device_kind,
        shape=KernelShape(
            head_dim=shape.head_dim, page_size=shape.page_size, dtype="bfloat16", lora_widths=()
        ),
    )
    return kernels.decode_attention, kernels.ragged_attention


def num_inputs(batch: Batch) -> int:
    return NUM_PREFILL_INPUTS if batch.chunks else NUM_INPUTS[batch.num_tokens]


def program_key(batch: Batch) -> tuple[Any, ...]:
    """Batches with equal keys run the same program."""
    if batch.chunks:
        return (batch.model, batch.name)
    return (batch.model, batch.num_tokens, batch.max_length)


def program_name(batch: Batch) -> str:
    return "attention_" + re.sub(r"\W", "_", "_".join(map(str, program_key(batch))))


def compiled(batch: Batch, pool: jax.Array, implementation: str | None) -> Any:
    """The program of a batch, or why there is none."""
    decode, ragged = chosen_kernels(batch.model, implementation)
    make = functools.partial(make_inputs, batch, BLOCK_Q[ragged], num_inputs=num_inputs(batch))
    call = functools.partial(
        attend,
        shape=batch.shape,
        decode={"implementation": decode},
        ragged={"implementation": ragged},
    )
    try:
        inputs, shared = jax.eval_shape(lambda pool: make(pool=pool), pool)
        return compile_calls(
            call, inputs, num_calls=len(inputs), shared=shared, name=program_name(batch)
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return error


def group_seconds(
    batches: list[Batch],
    programs: dict[tuple[Any, ...], Any],
    pool: jax.Array,
    implementation: str | None,
) -> list[float]:
    """Seconds a call of each batch, all in one trace."""

    def run() -> None:
        for batch in batches:
            ragged = chosen_kernels(batch.model, implementation)[1]
            inputs, shared = make_inputs(
                batch, BLOCK_Q[ragged], num_inputs=num_inputs(batch), pool=pool
            )
            for _ in range(1 + REPEATS):
                jax.block_until_ready(programs[program_key(batch)](inputs, shared))

    kernels = module_kernels(run)
    counts = collections.Counter(map(program_name, batches))
    runs = {
        name: iter(seconds_of_runs(kernels[f"jit_{name}"], count * (1 + REPEATS)))
        for name, count in counts.items()
    }
    seconds = []
    for batch in batches:
        _, *timed = itertools.islice(runs[program_name(batch)], 1 + REPEATS)  # the first one warms
        seconds.append(float(np.median(timed)) / num_inputs(batch))
    return seconds


def judged(batch: Batch, seconds: float, peaks: Peaks) -> dict[str, Any]:
    """One batch's time, floor and whether it meets its target; short prefill has none."""
    floor = batch.floor_s(peaks)
    share = PREFILL_SHARE if batch.chunks else DECODE_SHARE[batch.model]
    is_judged = not batch.chunks or (not batch.contexts and max(batch.ends) >= LONG_PREFILL)
    return {
        "model": batch.model,
        "batch": batch.name,
        "us": round(seconds * 1e6, 2),
        "floor_us": round(floor * 1e6, 2),
        "share": round(floor / seconds, 3),
        "limit_us": round(limit_s(floor, share) * 1e6, 2) if is_judged else None,
        "met": bool(seconds <= limit_s(floor, share)) if is_judged else None,
    }


def targets(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What target 3 names, each by its worst case."""
    found = []
    for model, kind in itertools.product(DECODE_SHARE, ("decode", "prefill")):
        judged = [
            case
            for case in cases
            if case["model"] == model and case["batch"].startswith(kind) and case["limit_us"]
        ]
        if judged:
            what = f"{kind} attention, {model}"
            found.append(worst_target("3", what, judged, "batch", plural="batches"))
    for case in cases:
        if case["batch"] in ("decode 64 x 512", "prefill 8192"):
            found.append(
                target(
                    "3",
                    f"{case['batch']}, {case['model']}",
                    measured=case["us"],
                    limit=case["limit_us"],
                    unit="us",
                    floor=case["floor_us"],
                )
            )
    return found


def grouped(batches: list[Batch]) -> list[list[Batch]]:
    """Batches of a few programs each, the first ones first."""
    by_program: dict[tuple[Any, ...], list[Batch]] = {}
    for batch in batches:
        by_program.setdefault(program_key(batch), []).append(batch)
    shared = list(by_program.values())
    groups = [shared[i : i + GROUP] for i in range(0, len(shared), GROUP)]
    return [[batch for of_program in group for batch in of_program] for group in groups]


def run_model(
    model: str, args: argparse.Namespace, peaks: Peaks, stop_s: float
) -> list[dict[str, Any]]:
    """Measure a model's batches; those not begun by `stop_s` are left out, and said to be."""
    batches = [
        batch
        for batch in decode_batches(model) + prefill_batches(model)
        if not args.only or any(part in batch.name for part in args.only)
    ]
    batches.sort(key=lambda batch: batch.name not in FIRST)
    page_elems = MODELS[model].page_elems
    pool = random_pool(int(POOL_BYTES / page_elems / 2) + 2, page_elems)
    cases: list[dict[str, Any]] = []
    for group in grouped(batches):
        programs: dict[tuple[Any, ...], Any] = {}
        firsts = {program_key(batch): batch for batch in reversed(group)}
        if time.perf_counter() < stop_s:
            with ThreadPoolExecutor(COMPILERS) as threads:
                found = threads.map(
                    lambda b: compiled(b, pool, args.implementation), firsts.values()
                )
                programs = dict(zip(firsts, found, strict=True))
        ready = []
        for batch in group:
            program = programs.get(program_key(batch))
            if program is None or isinstance(program, Exception):
                why = str(program).splitlines()[0] if program else "left out for lack of time"
                print(f"{model:14} {batch.name:32} {why}", flush=True)
            else:
                ready.append(batch)
        if ready:
            seconds = group_seconds(ready, programs, pool, args.implementation)
            for batch, of_batch in zip(ready, seconds, strict=True):
                cases.append(judged(batch, of_batch, peaks))
                print(line(cases[-1]), flush=True)
    pool.delete()
    return cases


def line(case: dict[str, Any]) -> str:
    return (
        f"{case['model']:14} {case['batch']:32} {case['us']:9.1f} us  floor {case['floor_us']:8.1f}"
        f"  {case['share']:6.1%}  met {case['met']}"
    )


def main() -> None:
    args = _parse()
    started = time.perf_counter()
    peaks = measure_peaks()
    cases = []
    for i, model in enumerate(args.models, start=1):
        stop_s = started + args.seconds * i / len(args.models)
        cases += run_model(model, args, peaks, stop_s)
    record(
        {
            "bench": "kernels_attention",
            "device": jax.devices()[0].device_kind,
            "commit": args.commit or commit(),
            "command": command(),
            "jax": jax.__version__,
            "kernels": {m: chosen_kernels(m, args.implementation) for m in args.models},
            "read_bytes_per_s": peaks.read_bytes_per_s,
            "flops_per_s": peaks.flops_per_s,
            "cases": cases,
            "targets": targets(cases),
        },
        args.out,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=sorted(DECODE_SHARE))
    parser.add_argument("--only", nargs="*", help="substrings of batch names")
    parser.add_argument("--implementation", help="of both kernels; default: the engine's choice")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where there is no repository to ask")
    parser.add_argument("--seconds", type=float, default=120, help="after these no batch is begun")
    return parser.parse_args()


if __name__ == "__main__":
    main()
