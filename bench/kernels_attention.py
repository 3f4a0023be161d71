"""Paged attention on real shapes against its floors, on the default device.

    python -m bench.kernels_attention --out results/kernels-attention.json

Decoding, prefill with and without a cached prefix, and mixed steps, for Llama-7B (MHA) and
Llama-3.1-8B (GQA-4) in bfloat16. One call is one layer.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.attention_cases import Batch, attend, make_inputs
from bench.floors import Peaks, limit_s, measure_peaks
from bench.kernel_timing import time_calls
from bench.record import commit, record

DECODE_SHARE = {"llama-7b": 0.9, "llama-3.1-8b": 0.8}  # of read bandwidth
PREFILL_SHARE = 0.6  # of the matmul rate
MAX_KV_BYTES = 40e9
BATCHES = (1, 8, 64, 256)
CONTEXTS = (128, 512, 525, 2048, 8192, 32768)
PROMPTS = (512, 2048, 8192)


def decode_batches(model: str) -> list[Batch]:
    batches = [
        Batch(name=f"decode {rows} x {context}", model=model, contexts=(context,) * rows)
        for rows in BATCHES
        for context in CONTEXTS
    ]
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


def measure(batch: Batch, args: argparse.Namespace, peaks: Peaks) -> dict[str, Any]:
    """One batch's time, floor and whether it meets its target (none is set for mixed steps)."""
    inputs, shared = make_inputs(batch, args.block_q)
    kernels = {"implementation": args.implementation}
    call = functools.partial(attend, shape=batch.shape, decode=kernels, ragged=kernels)
    seconds = time_calls(call, inputs, shared=shared)
    floor = batch.floor_s(peaks)
    share = PREFILL_SHARE if batch.chunks else DECODE_SHARE[batch.model]
    is_judged = not (batch.contexts and batch.chunks) and not batch.num_padding
    return {
        "model": batch.model,
        "batch": batch.name,
        "us": round(seconds * 1e6, 2),
        "floor_us": round(floor * 1e6, 2),
        "share": round(floor / seconds, 3),
        "limit_us": round(limit_s(floor, share) * 1e6, 2) if is_judged else None,
        "met": bool(seconds <= limit_s(floor, share)) if is_judged else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=sorted(DECODE_SHARE))
    parser.add_argument("--only", nargs="*", help="substrings of batch names")
    parser.add_argument("--implementation", default="triton")
    parser.add_argument("--block-q", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    peaks = measure_peaks()
    cases = []
    for model in args.models:
        for batch in decode_batches(model) + prefill_batches(model):
            if args.only and not any(part in batch.name for part in args.only):
                continue
            case = measure(batch, args, peaks)
            cases.append(case)
            print(
                f"{model:14} {batch.name:32} {case['us']:9.1f} us  floor {case['floor_us']:8.1f}"
                f"  {case['share']:6.1%}  met {case['met']}",
                flush=True,
            )
    record(
        {
            "bench": "kernels_attention",
            "device": jax.devices()[0].device_kind,
            "commit": commit(),
            "implementation": args.implementation,
            "block_q": args.block_q,
            "read_bytes_per_s": peaks.read_bytes_per_s,
            "flops_per_s": peaks.flops_per_s,
            "cases": cases,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
