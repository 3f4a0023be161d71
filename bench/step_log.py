"""Looking into a running core, for benchmarks: the time of its verbs, of its steps, of the GPU.

Wraps private methods of one core object; nothing of this is in the engine's own path.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sloraj.batch import ScheduledBatch
from sloraj.core import EngineCore
from sloraj.messages import Abort, Generate
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
        self._wrap(core._requests, "emit", "emit")
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
        bucket = self._buckets.pick(batch.num_tokens, batch.is_decode, batch.chunks)
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


class Decode:
    """All of `rows` requests decoding on a core, until closed; remembers the last batch.

    Raises RuntimeError if the pool does not hold them all at once.
    """

    def __init__(
        self, core: EngineCore, num_prompt: int, rows: int, adapters: Sequence[str | None]
    ) -> None:
        self.core, self.rows = core, rows
        runner = core._runner
        assert isinstance(runner, DeviceRunner)
        self.runner = runner
        self.change: Callable[[ScheduledBatch], ScheduledBatch] = lambda batch: batch
        self.batch: ScheduledBatch | None = None
        runner.execute = self._execute  # type: ignore[method-assign]
        num_output = core._config.max_model_len - num_prompt
        params = {"max_tokens": num_output, "temperature": 0.0, "ignore_eos": True, "seed": 0}
        for i in range(rows):
            core.submit(
                Generate(
                    request_id=f"decode-{i}", prompt_token_ids=[3 + i] * num_prompt, params=params,
                    adapter_id=adapters[i % len(adapters)],
                )
            )  # fmt: skip
        for _ in range(num_output):
            if self._are_all_decoding():
                return
            core.step()
        self.close()
        raise RuntimeError(f"{rows} requests never decoded together")

    def _are_all_decoding(self) -> bool:
        return self.batch is not None and self.batch.is_decode and len(self.batch.rows) == self.rows

    def _execute(self, batch: ScheduledBatch) -> Any:
        self.batch = self.change(batch)
        return type(self.runner).execute(self.runner, self.batch)

    def step_seconds(self, num_steps: int) -> np.ndarray:
        """Of the engine's own loop, streaming its tokens to nobody."""
        ends = []
        for _ in range(num_steps + 3):
            self.core.step()
            ends.append(time.perf_counter())
        if not self._are_all_decoding():
            raise RuntimeError("a request ended while it was measured")
        durations: np.ndarray = np.diff(ends)[2:]
        return durations

    def raw_seconds(self, num_steps: int) -> float:
        """A step, of the same batch enqueued again and again without reading its tokens."""
        assert self.batch is not None
        batch = dataclasses.replace(self.batch, installs=(), sends=())
        started = time.perf_counter()
        for _ in range(num_steps):
            handle = type(self.runner).execute(self.runner, batch)
        jax.block_until_ready(handle.drawn)
        return (time.perf_counter() - started) / num_steps

    def close(self) -> None:
        del self.runner.execute
        for request in self.core._requests:
            self.core.submit(Abort(request_id=request.request_id))
        while not self.core.is_idle:
            self.core.step()


def raw_step_s(
    core: EngineCore, num_prompt: int, rows: int, adapters: Sequence[str | None], repeats: int = 24
) -> dict[str, float]:
    """Milliseconds a decode step of all rows: by the engine's loop, and enqueued back to back."""
    try:
        decode = Decode(core, num_prompt, rows, adapters)
    except RuntimeError:
        return {}
    before = decode.step_seconds(repeats)
    raw_s = decode.raw_seconds(repeats)
    durations = np.append(before, decode.step_seconds(repeats))  # contexts grow
    decode.close()
    return {
        "rows": rows,
        "raw_ms": raw_s * 1e3,
        "engine_ms": float(np.mean(durations)) * 1e3,
        "engine_max_ms": float(np.max(durations)) * 1e3,
        "raw_over_engine": raw_s / float(np.mean(durations)),
    }
