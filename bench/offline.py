"""Throughput of the engine in-process: a fixed set of requests, all at once, to the end.

    python -m bench.offline --geometry llama-7b --adapters 200 --ranks 64,32,16,8 --requests 256 \\
        --input 512 --output 128 --max-num-seqs 128 --out bench/results/.../offline.json

Runs the requests twice on one engine: on the base model alone, then spread over the adapters.
Prompts are random token ids, generation is greedy and ignores eos. The result is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.geometries import GEOMETRIES, write_geometry
from bench.random_adapters import random_adapter_loader
from bench.record import commit, record
from sloraj.build import build_core
from sloraj.config import EngineConfig
from sloraj.core import EngineCore
from sloraj.messages import Dead, Generate, RequestFailed, TokenOutput

NOT_RECORDED = ("out", "cache_dir", "commit")  # of this machine, or said elsewhere


@dataclasses.dataclass(slots=True)
class Timings:
    """Seconds of one request, from the start of the run."""

    first_token_s: float = 0.0
    last_token_s: float = 0.0
    num_tokens: int = 0


def run_requests(
    core: EngineCore, prompts: np.ndarray, adapters: list[str | None], num_output: int, tag: str
) -> dict[str, Any]:
    """Submit every request at once and step until all have finished."""
    timings = {f"{tag}-{i}": Timings() for i in range(len(prompts))}
    before = core.stats()
    params = {"max_tokens": num_output, "temperature": 0.0, "ignore_eos": True, "seed": 0}
    started = time.perf_counter()
    for (request_id, _), prompt, adapter in zip(timings.items(), prompts, adapters, strict=True):
        core.submit(
            Generate(
                request_id=request_id, prompt_token_ids=prompt.tolist(), params=params,
                adapter_id=adapter,
            )
        )  # fmt: skip
    num_open = len(timings)
    steps: list[tuple[float, int]] = []  # end of each step, and the tokens that it told of
    while num_open:
        messages = core.step()
        now = time.perf_counter() - started
        steps.append((now, len(messages)))
        for message in messages:
            if isinstance(message, RequestFailed | Dead):
                raise RuntimeError(f"{tag}: {message}")
            if isinstance(message, TokenOutput):
                timing = timings[message.request_id]
                timing.first_token_s = timing.first_token_s or now
                timing.last_token_s = now
                timing.num_tokens += len(message.token_ids)
                num_open -= message.finish_reason is not None
    wall_s = time.perf_counter() - started
    return _summary(core, before, timings, wall_s, prompts.size) | _decode_steps(timings, steps)


def _decode_steps(timings: dict[str, Timings], steps: list[tuple[float, int]]) -> dict[str, float]:
    """The last stretch in which every running request decodes: its rows, and seconds a step."""
    begin = max(t.first_token_s for t in timings.values())
    end = min((t.last_token_s for t in timings.values() if t.last_token_s > begin), default=begin)
    ends = [(now, rows) for now, rows in steps if begin < now < end]
    if len(ends) < 3:
        return {}
    durations = np.diff([now for now, _ in ends])
    return {
        "decode_rows": float(np.median([rows for _, rows in ends])),
        "decode_step_s": float(np.median(durations)),
    }


def _summary(
    core: EngineCore,
    before: dict[str, Any],
    timings: dict[str, Timings],
    wall_s: float,
    num_prompt_tokens: int,
) -> dict[str, Any]:
    after = core.stats()
    num_output_tokens = sum(t.num_tokens for t in timings.values())
    first = np.array([t.first_token_s for t in timings.values()])
    per_token = np.array(
        [(t.last_token_s - t.first_token_s) / max(t.num_tokens - 1, 1) for t in timings.values()]
    )
    counters = ("steps", "preemptions", "adapter_installs", "adapter_evictions")
    return {
        "wall_s": wall_s,
        "requests_per_s": len(timings) / wall_s,
        "output_tokens_per_s": num_output_tokens / wall_s,
        "total_tokens_per_s": (num_output_tokens + num_prompt_tokens) / wall_s,
        "num_output_tokens": num_output_tokens,
        "num_prompt_tokens": num_prompt_tokens,
        "first_token_s": _quantiles(first),
        "time_per_output_token_s": _quantiles(per_token),
        **{name: after[name] - before[name] for name in counters},
        "num_adapters_resident": after["num_adapters_resident"],
        "num_pages_free": after["num_pages_free"],
        "num_pages_adapters": after["num_pages_adapters"],
        "compiles_after_ready": after["runner"]["compiles_after_ready"],
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}


def main() -> None:
    args = _parse()
    with tempfile.TemporaryDirectory() as scratch:
        model = write_geometry(args.geometry, Path(scratch))
        result = _measure(args, model)
    record(result, args.out)


def _measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    ranks = [int(r) for r in args.ranks.split(",")]
    names = [f"adapter-{i}" for i in range(args.adapters)]
    config = EngineConfig(
        model=model,
        served_model_name=args.geometry,
        random_weights=True,
        adapters=tuple(
            (name, f"random:{ranks[i % len(ranks)]}:{i}") for i, name in enumerate(names)
        ),
        max_rank=max(ranks),
        max_model_len=args.input + args.output + 16,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        pool_bytes=args.pool_bytes,
        kernels=args.kernels,
        compilation_cache_dir=args.cache_dir,
    )
    stages: dict[str, float] = {}
    started = time.perf_counter()

    def note(stage: str, done: int, total: int) -> None:
        if done == total:
            stages[f"{stage}_done_s"] = time.perf_counter() - started

    core, info = build_core(config, note, make_loader=random_adapter_loader)
    startup_s = time.perf_counter() - started
    result: dict[str, Any] = {
        "bench": "offline",
        "device": info["device"],
        "commit": args.commit or commit(),
        "jax": jax.__version__,
        "settings": {k: v for k, v in vars(args).items() if k not in NOT_RECORDED},
        "engine": {k: v for k, v in info.items() if k != "model_path"},
        "startup_s": startup_s,
        "startup_stages": stages,
    }
    if not args.start_only:
        rng = np.random.default_rng(0)
        vocab = GEOMETRIES[args.geometry]["vocab_size"]
        prompts = rng.integers(3, vocab, (args.requests, args.input), dtype=np.int32)
        spread: list[str | None] = [names[i % len(names)] for i in range(args.requests)]
        base: list[str | None] = [None] * args.requests
        result["base"] = run_requests(core, prompts, base, args.output, "base")
        result["adapters"] = run_requests(core, prompts, spread, args.output, "adapters")
        result["adapters_again"] = run_requests(core, prompts, spread, args.output, "again")
        ratio = result["adapters"]["output_tokens_per_s"] / result["base"]["output_tokens_per_s"]
        result["adapters_over_base"] = ratio
    core.check_integrity()
    result["runner"] = core.stats()["runner"]
    result["memory"] = jax.devices()[0].memory_stats()
    return result


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-7b")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--ranks", default="64,32,16,8")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--input", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--pool-bytes", type=int)
    parser.add_argument("--kernels", choices=("xla", "triton", "mosaic"))
    parser.add_argument("--cache-dir")
    parser.add_argument("--commit", help="where the tree is not a repository")
    parser.add_argument("--start-only", action="store_true", help="measure start-up alone")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
