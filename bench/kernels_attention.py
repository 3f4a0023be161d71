"""Paged attention on real shapes against its floors, on the default device.

    python -m bench.kernels_attention --out results/kernels-attention.json

Decoding, prefill with and without a cached prefix, and mixed steps, for Llama-7B (MHA) and
Llama-3.1-8B (GQA-4) in bfloat16. One call is one layer.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.attention_cases import Batch, attend, make_inputs
from bench.floors import Peaks, limit_s, measure_peaks
from bench.kernel_timing import compile_calls, time_compiled
from bench.record import command, commit, record
from bench.summary import target, worst_target
from pallas_kernels.dispatch import KernelShape, resolve_kernels
from pallas_kernels.shapes import MODELS
from sloraj.build import BLOCK_Q

DECODE_SHARE = {"llama-7b": 0.9, "llama-3.1-8b": 0.8}  # of read bandwidth
PREFILL_SHARE = 0.6  # of the matmul rate
MAX_KV_BYTES = 40e9
BATCHES = (1, 8, 64, 256)  # 8 rows run in the bucket of 16
CONTEXTS = (128, 512, 2048, 8192, 32768)
FIRST = ("decode 64 x 512", "prefill 8192", "decode 64 x 525")  # should time run out
PROMPTS = (512, 2048, 8192)
LONG_PREFILL = 8192  # tokens, those cached included
COMPILERS = 14  # threads


def decode_batches(model: str) -> list[Batch]:
    batches = [
        Batch(
            name=f"decode {rows} x {context}",
            model=model,
            contexts=(context,) * rows,
            num_padding=8 if rows == 8 else 0,
        )
        for rows in BATCHES
        for context in CONTEXTS
    ]
    batches.append(Batch(name="decode 64 x 525", model=model, contexts=(525,) * 64))
    lengths = np.random.default_rng(0).integers(16, 4096, size=64).tolist()
    batches.append(Batch(name="decode 64 x 16..4096", model=model, contexts=tuple(lengths)))
    skewed = (32768, *(512,) * 63)
    batches.append(Batch(name="decode 63 x 512 and 32768", model=model, contexts=skewed))
    return [batch for batch in batches if 2 * batch.kv_bytes < MAX_KV_BYTES]


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


def compiled(batch: Batch, implementation: str | None) -> Any:
    """The program of a batch, or why there is none."""
    decode, ragged = chosen_kernels(batch.model, implementation)
    arguments = jax.eval_shape(functools.partial(make_inputs, batch, BLOCK_Q[ragged]))
    call = functools.partial(
        attend,
        shape=batch.shape,
        decode={"implementation": decode},
        ragged={"implementation": ragged},
    )
    inputs, shared = arguments
    try:
        return compile_calls(call, inputs, num_calls=len(inputs), shared=shared)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return error


def measure(batch: Batch, program: Any, implementation: str | None, peaks: Peaks) -> dict[str, Any]:
    """One batch's time, floor and whether it meets its target; short prefill has none."""
    ragged = chosen_kernels(batch.model, implementation)[1]
    inputs, shared = make_inputs(batch, BLOCK_Q[ragged])
    seconds = time_compiled(program, inputs, num_calls=len(inputs), shared=shared, repeats=3)
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


def main() -> None:
    args = _parse()
    started = time.perf_counter()
    batches = [
        batch
        for model in args.models
        for batch in decode_batches(model) + prefill_batches(model)
        if not args.only or any(part in batch.name for part in args.only)
    ]
    batches.sort(key=lambda batch: batch.name not in FIRST)
    with ThreadPoolExecutor(COMPILERS) as pool:
        programs = list(pool.map(lambda batch: compiled(batch, args.implementation), batches))
    peaks = measure_peaks()
    cases: list[dict[str, Any]] = []
    for batch, program in zip(batches, programs, strict=True):
        if isinstance(program, Exception):
            print(f"{batch.model:14} {batch.name:32} {str(program).splitlines()[0]}", flush=True)
            continue
        if time.perf_counter() - started > args.seconds:
            print(f"{batch.model:14} {batch.name:32} left out for lack of time", flush=True)
            continue
        case = measure(batch, program, args.implementation, peaks)
        cases.append(case)
        print(
            f"{batch.model:14} {batch.name:32} {case['us']:9.1f} us  floor {case['floor_us']:8.1f}"
            f"  {case['share']:6.1%}  met {case['met']}",
            flush=True,
        )
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
    parser.add_argument("--seconds", type=float, default=25, help="after these no batch is begun")
    return parser.parse_args()


if __name__ == "__main__":
    main()
