"""Looking into a running core, for benchmarks: the time of its verbs, of its steps, of the GPU.

Wraps private methods of one core object; nothing of this is in the engine's own path.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sloraj.batch import ScheduledBatch
from sloraj.core import EngineCore
from sloraj.messages import Generate
from sloraj.runner import runner as runner_module
from sloraj.runner.runner import DeviceRunner


class Verbs:
    """Adds up the time of a core's verbs by wrapping them; for benchmarks alone."""

    def __init__(self, core: EngineCore) -> None:
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._wrapped: list[tuple[Any, str, Any]] = []
        runner, scheduler = core._runner, core._scheduler
        assert isinstance(runner, DeviceRunner)
        self._wrap(core, "_take_messages", "messages")
        self._wrap(core, "_emit_event", "emit")
        self._wrap(scheduler, "schedule", "schedule")
        self._wrap(scheduler, "update", "update")
        self._wrap(runner, "execute", "execute")
        self._wrap(runner, "collect", "collect")
        self._wrap(runner, "_run_forward", "forward")
        self._wrap(runner, "_run_sample", "sample")
        self._wrap(runner, "_install_adapter", "install")
        self._wrap(runner, "_reset_rows", "reset")
        self._wrap(runner_module, "pack_step", "pack_step")

    def close(self) -> None:
        for owner, name, inner in self._wrapped:
            setattr(owner, name, inner)

    def _wrap(self, owner: Any, name: str, verb: str) -> None:
        self._wrapped.append((owner, name, getattr(owner, name)))
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._seconds[verb] += time.perf_counter() - started

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """Seconds of each verb since the last call."""
        seconds, self._seconds = dict(self._seconds), collections.defaultdict(float)
        return seconds


class StepLog:
    """Device time of each step by its bucket.

    A call of `step` returns when the step enqueued by the call before has ended, so the time
    between two returns is that step's.
    """

    def __init__(self, core: EngineCore) -> None:
        runner = core._runner
        assert isinstance(runner, DeviceRunner)
        self._runner, self._inner = runner, runner.execute
        self._buckets, self._last_end_s = runner._buckets, 0.0
        self._current: tuple[str, int] | None = None  # enqueued by this call
        self._before: tuple[str, int] | None = None
        self._rows: dict[str, list[tuple[float, int]]] = collections.defaultdict(list)
        runner.execute = self._execute  # type: ignore[method-assign]

    def _execute(self, batch: ScheduledBatch) -> Any:
        bucket = self._buckets.pick(batch.num_tokens, batch.is_decode)
        self._current = (bucket.name, batch.num_tokens)
        return self._inner(batch)

    def end_step(self, now_s: float) -> None:
        if self._before is not None:
            name, num_tokens = self._before
            self._rows[name].append((now_s - self._last_end_s, num_tokens))
        self._before, self._current, self._last_end_s = self._current, None, now_s

    def table(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "steps": len(rows),
                "seconds": sum(s for s, _ in rows),
                "median_ms": float(np.median([s for s, _ in rows])) * 1e3,
                "mean_tokens": float(np.mean([n for _, n in rows])),
            }
            for name, rows in sorted(self._rows.items())
        }

    def close(self) -> None:
        self._runner.execute = self._inner  # type: ignore[method-assign]


def start_decode(
    core: EngineCore, num_prompt: int, rows: int, adapters: Sequence[str | None], num_output: int
) -> list[ScheduledBatch]:
    """Step until all of `rows` requests decode. The list grows with each batch executed."""
    params = {"max_tokens": num_output, "temperature": 0.0, "ignore_eos": True, "seed": 0}
    for i in range(rows):
        core.submit(
            Generate(
                request_id=f"decode-{i}", prompt_token_ids=[3 + i] * num_prompt, params=params,
                adapter_id=adapters[i % len(adapters)],
            )
        )  # fmt: skip
    runner = core._runner
    assert isinstance(runner, DeviceRunner)
    batches: list[ScheduledBatch] = []
    inner = type(runner).execute

    def keep(batch: ScheduledBatch) -> Any:
        batches.append(batch)
        return inner(runner, batch)

    runner.execute = keep  # type: ignore[method-assign]
    while not (batches and batches[-1].is_decode and len(batches[-1].rows) == rows):
        core.step()
    return batches


def end_decode(core: EngineCore) -> None:
    del core._runner.execute  # type: ignore[attr-defined]
    for request_id in list(core._requests):
        core._release(core._requests[request_id])
    while not core.is_idle:
        core.step()


def raw_step_s(
    core: EngineCore, num_prompt: int, rows: int, adapters: Sequence[str | None], repeats: int = 40
) -> dict[str, float]:
    """Milliseconds a decode step of all rows: by the engine's loop, and enqueued back to back."""
    num_output = core._config.max_model_len - num_prompt
    repeats = min(repeats, num_output - 20 - num_prompt * rows // 1024)
    batches = start_decode(core, num_prompt, rows, adapters, num_output)
    ends = []
    for _ in range(repeats):
        core.step()
        ends.append(time.perf_counter())
    runner = core._runner
    calls = []
    started = time.perf_counter()
    for _ in range(repeats):
        call = time.perf_counter()
        handle = runner.execute(batches[-1])
        calls.append(time.perf_counter() - call)
    jax.block_until_ready(handle.drawn)
    raw_s = (time.perf_counter() - started) / repeats
    end_decode(core)
    durations = np.diff(ends)[3:]
    return {
        "rows": rows,
        "raw_ms": raw_s * 1e3,
        "engine_ms": float(np.median(durations)) * 1e3,
        "engine_mean_ms": float(np.mean(durations)) * 1e3,
        "engine_max_ms": float(np.max(durations)) * 1e3,
        "execute_ms": float(np.median(calls[:5])) * 1e3,
        "raw_over_engine": raw_s / float(np.mean(durations)),
    }


def gpu_busy(
    core: EngineCore,
    num_prompt: int,
    rows: int,
    adapters: Sequence[str | None],
    folder: Path,
    num_steps: int = 10,
) -> dict[str, Any]:
    """Share of the time in which some stream of the GPU works, from a profile of decode steps.

    Graphs stay on under the profiler with `--xla_enable_command_buffers_during_profiling=true`.
    """
    start_decode(core, num_prompt, rows, adapters, core._config.max_model_len - num_prompt)
    for _ in range(3):
        core.step()
    with jax.profiler.trace(str(folder)):
        for _ in range(num_steps):
            core.step()
    end_decode(core)
    file = max(folder.rglob("*.xplane.pb"))
    spans, lines = [], {}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if "/device:GPU" not in plane.name:
            continue
        for line in plane.lines:
            events = [(e.start_ns, e.start_ns + e.duration_ns) for e in line.events]
            lines[f"{plane.name} {line.name}"] = len(events)
            if line.name.startswith("Stream"):
                spans += events
    return {"lines": lines} | (_busy(sorted(spans)) if spans else {})


def _busy(spans: list[tuple[float, float]]) -> dict[str, float]:
    """Of sorted (start, end) in nanoseconds, overlaps counted once."""
    busy, (first, end) = 0.0, spans[0]
    gaps = []
    busy += end - first
    for start, stop in spans[1:]:
        if start > end:
            gaps.append(start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {
        "span_ms": (end - first) / 1e6,
        "idle": 1 - busy / (end - first),
        "num_gaps_over_20_us": sum(g > 20e3 for g in gaps),
        "longest_gap_us": max(gaps, default=0.0) / 1e3,
    }
