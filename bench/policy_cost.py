"""What looking ahead costs the step thread: early abort, prefetch and the step-time model.

    python -m bench.policy_cost
    python -m bench.policy_cost --rows 64 --waiting 100 --step-ms 10

An engine core on a device that answers after `--step-ms`, `--rows` of requests running and
`--waiting` more in the queue, over `--adapters` of ranks 8 to 64 of which `--slots` fit. Prints
microseconds a step: the mean, which counts what is done only now and then, and the largest.
"""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sloraj.batch import PackedAdapter, SampledToken, ScheduledBatch, StepResult
from sloraj.config import SchedulerConfig
from sloraj.core import EngineCore
from sloraj.messages import Generate
from sloraj.policies.settings import QueueConfig

PAGES_OF = (2, 4, 8, 16)  # of ranks 8, 16, 32, 64: Llama-7B, pages of 8 MiB
PAGE_BYTES = 8 << 20
SYSTEMS: dict[str, dict[str, Any]] = {
    "nothing": {"prefetch": False},
    "prefetch": {},
    "prefetch, early abort (model)": {"early_abort": "model"},
    "prefetch, early abort (paper)": {"early_abort": "paper"},
    "prefetch, early abort (model), vtc": {
        "early_abort": "model", "queue": QueueConfig(queue_order="vtc"),
    },
}  # fmt: skip


class PacedRunner:
    """Implements `sloraj.batch.Runner`: every step takes `step_s`, and computes nothing."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self._ends_s = 0.0

    def execute(self, batch: ScheduledBatch) -> tuple[ScheduledBatch, float]:
        self._ends_s = max(self._ends_s, time.monotonic()) + self.step_s
        return batch, self._ends_s

    def collect(self, handle: tuple[ScheduledBatch, float]) -> StepResult:
        batch, ends_s = handle
        time.sleep(max(ends_s - time.monotonic(), 0.0))
        tokens = [SampledToken(row.sequence, 3, True) for row in batch.rows if row.samples]
        return StepResult(batch.step, tuple(tokens))

    def stats(self) -> dict[str, Any]:
        return {}


def load(path: str) -> tuple[PackedAdapter, dict[str, Any]]:
    """ "number": an adapter as large as a real one, which takes no memory."""
    shape = (PAGES_OF[int(path) % len(PAGES_OF)], 1, PAGE_BYTES)
    pages = np.broadcast_to(np.zeros((), np.int8), shape)
    return PackedAdapter(path, pages, np.zeros((1, 7, 4), np.int32), 64), {}


def make_core(args: argparse.Namespace, system: dict[str, Any]) -> EngineCore:
    config = SchedulerConfig(
        num_pages=100 * args.rows, page_size=16, max_model_len=4096, max_num_seqs=args.rows,
        max_num_batched_tokens=2048, max_adapter_slots=args.slots, max_num_waiting=100_000,
        max_rank=64, vocab_size=100, eos_token_ids=(), token_buckets=(128, 256, 512, 1024, 2048),
        install_pages_per_step=32, first_token_slo_s=1e6, **system,
    )  # fmt: skip
    core = EngineCore(config, PacedRunner(0.0), load)
    core.preload([(f"a{n}", str(n)) for n in range(args.adapters)], lambda done: None)
    draw = np.random.default_rng(0)
    for n in range(args.rows + args.waiting):
        core.submit(
            Generate(
                request_id=str(n),
                prompt_token_ids=[1] * int(draw.integers(8, 512)),
                params={"max_tokens": int(draw.integers(8, 512)), "ignore_eos": True},
                adapter_id=f"a{int(args.adapters * draw.random() ** 3)}",
                tenant=f"t{n % 50}",
            )
        )
    return core


def measure(args: argparse.Namespace, system: dict[str, Any]) -> np.ndarray:
    """Seconds of policies in each step, f64 [steps]."""
    core = make_core(args, system)
    spent: dict[str, float] = collections.defaultdict(float)
    for owner, names in (
        (core._step_times, ("enqueue", "read")),
        (core._scheduler._foresight, ("too_late", "plan_sends")),
    ):
        for name in names:
            setattr(owner, name, _timed(getattr(owner, name), spent, name))
    while core._scheduler.num_running < args.rows:
        core.step()
    assert isinstance(core._runner, PacedRunner)
    core._runner.step_s = args.step_ms / 1e3
    steps = []
    for _ in range(args.steps):
        spent.clear()
        core.step()
        steps.append(sum(spent.values()))
    return np.array(steps[5:])


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args)
        finally:
            spent[name] += time.thread_time() - started

    return timed


def main() -> None:
    args = _parse()
    print(f"{'us a step':38} {'mean':>7} {'median':>7} {'p99':>7} {'max':>7}")
    for name, system in SYSTEMS.items():
        us = 1e6 * measure(args, system)
        figures = (us.mean(), np.median(us), np.percentile(us, 99), us.max())
        print(f"{name:38} " + " ".join(f"{value:7.0f}" for value in figures))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=400)
    parser.add_argument("--slots", type=int, default=300)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=8.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
