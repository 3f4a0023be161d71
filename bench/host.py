"""Host time of a step, verb by verb, with programs that take no device time.

    python -m bench.host --rows 64 256

An engine core of a Llama-7B's depth and number of arrays, tiny in width, whose forward and sample
programs only pass their state on: what is left is the host's own work. All rows decode; then
requests come and go with each step. The figures are medians, in microseconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.geometries import GEOMETRIES, write_geometry
from bench.random_adapters import random_adapter_loader
from bench.record import record
from bench.step_log import Verbs
from sloraj.build import build_core
from sloraj.config import EngineConfig
from sloraj.core import EngineCore
from sloraj.messages import Abort, Generate, TokenOutput
from sloraj.runner import runner as runner_module

DEEP = "tiny-deep"
INSIDE = ("pack_step", "forward", "sample")  # parts of execute
VERBS = ("messages", "schedule", "execute", "collect", "update", "emit")


def instant_core(rows: int, num_layers: int, scratch: Path) -> EngineCore:
    """A core whose forward and sample programs do nothing."""
    GEOMETRIES[DEEP] = GEOMETRIES["tiny"] | {"num_hidden_layers": num_layers}
    config = EngineConfig(
        model=write_geometry(DEEP, scratch),
        random_weights=True,
        adapters=tuple((f"adapter-{i}", f"random:8:{i}") for i in range(rows)),
        max_rank=8,
        max_model_len=2048,
        max_num_seqs=rows,
        max_num_batched_tokens=2048,
        pool_bytes=1 << 30,
        kernels="xla",
        max_num_waiting=10_000,
    )
    module: Any = runner_module  # whose import is replaced for a while
    real = module.compile_all

    def compile_instant(jobs: list[Any], progress: Any) -> dict[Any, Any]:
        quick = [job for job in jobs if job.key[0] in ("forward", "sample")]
        slow: dict[Any, Any] = real([job for job in jobs if job not in quick], progress)
        return slow | {job.key: _instant(job) for job in quick}

    module.compile_all = compile_instant
    try:
        return build_core(config, lambda *_: None, make_loader=random_adapter_loader)[0]
    finally:
        module.compile_all = real


def _instant(job: Any) -> Any:
    """A program with the arguments and results of `job` that passes its state on."""
    outputs = jax.eval_shape(job.program, *job.arguments)
    is_forward = job.key[0] == "forward"

    def program(*arguments: Any) -> Any:
        made = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), outputs[1:])
        return (arguments[2] if is_forward else arguments[0], *made)

    donated = 2 if is_forward else 0
    return jax.jit(program, donate_argnums=donated).lower(*job.arguments).compile()


def drive(
    core: EngineCore, verbs: Verbs, rows: int, *, num_output: int, num_steps: int
) -> dict[str, Any]:
    """Keep `rows` requests running; medians of `num_steps` steps once all of them decode."""
    params = {"max_tokens": num_output, "temperature": 0.0, "ignore_eos": True, "seed": 0}
    rng = np.random.default_rng(0)
    made = 0

    def submit(max_tokens: int) -> None:
        nonlocal made
        core.submit(
            Generate(
                request_id=f"r{made}-{num_output}",
                prompt_token_ids=rng.integers(3, 500, 128).tolist(),
                params=params | {"max_tokens": max_tokens},
                adapter_id=f"adapter-{made % rows}",
            )
        )
        made += 1

    for i in range(rows):  # ends spread evenly
        submit(max(2, num_output * (i + 1) // rows) if num_output < 500 else num_output)
    for _ in range(128 * rows // 1024 + 10):
        core.step()
    samples: list[dict[str, float]] = []
    verbs.take()
    for _ in range(num_steps):
        started = time.perf_counter()
        messages = core.step()
        took = time.perf_counter() - started
        samples.append(verbs.take() | {"step": took})
        for message in messages:
            if isinstance(message, TokenOutput) and message.finish_reason:
                submit(num_output)
    names = [*VERBS, *INSIDE, "reset", "install", "step"]
    result = {n: float(np.median([s.get(n, 0.0) for s in samples])) * 1e6 for n in names}
    result["step_mean"] = float(np.mean([s["step"] for s in samples])) * 1e6
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"bench": "host", "jax": jax.__version__, "unit": "us"}
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as scratch:
            core = instant_core(rows, args.layers, Path(scratch))
        verbs = Verbs(core)
        for name, num_output in (("decode", 1800), ("churn", 64)):
            measured = drive(core, verbs, rows, num_output=num_output, num_steps=args.steps)
            result[f"{name}-{rows}"] = {k: round(v) for k, v in measured.items()}
            _finish(core)
    record(result, args.out)


def _finish(core: EngineCore) -> None:
    for request in core._requests:
        core.submit(Abort(request_id=request.request_id))
    core.step()
    core.check_integrity()


if __name__ == "__main__":
    main()
