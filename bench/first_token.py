"""What a cold adapter costs the first token: held in host memory, asked for by one request alone.

    python -m bench.first_token --geometry llama-7b --out bench/results/.../first-token.json

On an idle engine, per rank and length of prompt: a request to an adapter that is not on the device,
then one to the same adapter, which by then is. Prompts are random and of equal length. What crosses
to the device is counted against the adapters' bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.geometries import GEOMETRIES, write_geometry
from bench.random_adapters import random_adapter_loader
from bench.record import command, commit, record
from bench.summary import target
from sloraj.build import build_core
from sloraj.config import EngineConfig
from sloraj.core import EngineCore
from sloraj.messages import Generate, RequestFailed, TokenOutput

MAX_PENALTY = {8: 0.1, 64: 0.35}  # of the first token's time, by rank
MIN_PROMPT = 512  # tokens, from which these are wanted
WARM_UPS = 4  # pairs that are not counted: a program's first runs are not captured in a graph


def first_token_s(core: EngineCore, prompt: np.ndarray, adapter: str, request_id: str) -> float:
    """Seconds from the submission of a request to its only token, on an idle core."""
    params = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "seed": 0}
    started = time.perf_counter()
    core.submit(
        Generate(
            request_id=request_id, prompt_token_ids=prompt.tolist(), params=params,
            adapter_id=adapter,
        )
    )  # fmt: skip
    while True:
        for message in core.step():
            if isinstance(message, RequestFailed):
                raise RuntimeError(str(message.error))
            if isinstance(message, TokenOutput) and message.request_id == request_id:
                found = time.perf_counter() - started
                while not core.is_idle:
                    core.step()
                return found


def measure(
    core: EngineCore, names: list[str], num_prompt: int, vocab_size: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Each adapter cold, then warm; the first few pairs are left out."""
    prompts = rng.integers(3, vocab_size, (2, len(names), num_prompt))
    before = core.stats()
    seconds = np.array(
        [
            [
                first_token_s(core, prompts[turn, i], name, f"{name}-{num_prompt}-{turn}")
                for turn in range(2)
            ]
            for i, name in enumerate(names)
        ]
    )
    after = core.stats()
    installs = after["adapter_installs"] - before["adapter_installs"]
    if installs != len(names):
        raise RuntimeError(f"{installs} installs of {len(names)} adapters: some were not cold")
    sent = after["runner"]["install_bytes"] - before["runner"]["install_bytes"]
    held = {name: core._registry.acquire(name) for name in names}
    num_bytes = sum(lease.version.packed.num_bytes for lease in held.values())
    for lease in held.values():
        core._registry.release(lease)
    cold_s, warm_s = np.median(seconds[WARM_UPS:], axis=0).tolist()
    return {
        "prompt": num_prompt,
        "adapters": len(names) - WARM_UPS,
        "cold_ms": cold_s * 1e3,
        "warm_ms": warm_s * 1e3,
        "penalty": cold_s / warm_s - 1,
        "sent_over_held": sent / num_bytes,
    }


def targets(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for case in cases:
        what = f"rank {case['rank']}, prompt of {case['prompt']} tokens"
        if case["rank"] in MAX_PENALTY and case["prompt"] >= MIN_PROMPT:
            found.append(
                target("C4", f"first token of a cold adapter later by, {what}", unit="of it",
                       measured=case["penalty"], limit=MAX_PENALTY[case["rank"]])
            )  # fmt: skip
        found.append(
            target("C4", f"bytes sent to the device over the adapter's, {what}", unit="",
                   measured=case["sent_over_held"], limit=1.0)
        )  # fmt: skip
    return found


def main() -> None:
    args = _parse()
    names = {
        (rank, prompt): [f"r{rank}-p{prompt}-{i}" for i in range(args.adapters + WARM_UPS)]
        for rank in args.ranks
        for prompt in args.prompts
    }
    paths = {name: rank for (rank, _), group in names.items() for name in group}
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(
            model=write_geometry(args.geometry, Path(scratch)), random_weights=True,
            adapters=tuple((name, f"random:{rank}:{i}") for i, (name, rank) in
                           enumerate(paths.items())),
            max_rank=max(args.ranks), max_model_len=max(args.prompts) + 16, max_num_seqs=8,
            max_num_batched_tokens=max(args.prompts), max_adapter_slots=len(paths),
            pool_bytes=args.pool_bytes, compilation_cache_dir=args.cache_dir,
        )  # fmt: skip
        core, info = build_core(config, lambda *_: None, make_loader=random_adapter_loader)
    rng, vocab_size = np.random.default_rng(0), GEOMETRIES[args.geometry]["vocab_size"]
    cases = []
    for (rank, prompt), group in names.items():
        cases.append({"rank": rank} | measure(core, group, prompt, vocab_size, rng))
        print(cases[-1], flush=True)
    record(
        {
            "bench": "first_token", "device": info["device"], "commit": args.commit or commit(),
            "command": command(), "jax": jax.__version__, "geometry": args.geometry,
            "cases": cases, "targets": targets(cases),
            "compiles_after_ready": core.stats()["runner"]["compiles_after_ready"],
        },
        args.out,
    )  # fmt: skip


def _parse() -> argparse.Namespace:
    def ints(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-7b")
    parser.add_argument("--ranks", type=ints, default=[8, 64])
    parser.add_argument("--prompts", type=ints, default=[512, 1024])
    parser.add_argument("--adapters", type=int, default=16, help="of each rank and prompt")
    parser.add_argument("--pool-bytes", type=int)
    parser.add_argument("--cache-dir")
    parser.add_argument("--commit", help="where the tree is not a repository")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
