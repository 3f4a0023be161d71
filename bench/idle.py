"""What the host costs the device: idle time between steps, and what installs add to decoding.

    XLA_FLAGS=--xla_enable_command_buffers_during_profiling=true \
        python -m bench.idle --rows 1,64,256 --cache-dir cache --out ...

Per number of rows, each with its own rank-8 adapter: a step by the engine's loop, a step of the
same batch enqueued without reading its tokens, and the share of the time in which no kernel runs,
from a profile of the engine's steps with CUDA graphs on.
At 64 rows adapters are then installed during real decode steps, one in 50 ms and four a step; the
profile gives the rate of their copies.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.geometries import GEOMETRIES, write_geometry
from bench.profile_step import stream_events
from bench.random_adapters import random_adapter_loader
from bench.record import command, commit, record
from bench.step_log import Decode
from bench.summary import target
from sloraj.batch import AdapterInstall, ScheduledBatch
from sloraj.build import build_core
from sloraj.config import EngineConfig
from sloraj.core import EngineCore

MAX_IDLE = {1: 0.05, 64: 0.02, 256: 0.02}
NUM_STEPS = 24
NUM_PROFILED = 12
MAX_EVERY = 8  # steps between installs: quick steps get more than 20 a second
NUM_INSTALLED = 16  # adapters that are installed again and again, in slots of their own
Spans = list[tuple[float, float]]


def profiled(run: Callable[[], None]) -> dict[str, Spans]:
    """Spans in nanoseconds, sorted, of "kernels" and of "copies" to the device of 1 MB and more."""
    found: dict[str, Spans] = {"kernels": [], "copies": []}
    for stream, event in stream_events(run):
        span = (event.start_ns, event.start_ns + event.duration_ns)
        if "Memcpy" not in stream:
            found["kernels"].append(span)
        elif "H2D" in stream and event.duration_ns > 50e3:  # 1 MB takes 20 us
            found["copies"].append(span)
    return {name: sorted(spans) for name, spans in found.items()}


def covered_s(spans: Spans) -> float:
    """Seconds that at least one span covers."""
    covered, end = 0.0, 0.0
    for start, stop in spans:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered / 1e9


def idle_share(spans: Spans) -> float:
    """Of the time from the first span's start to the last one's end, what none covers."""
    if not spans:  # no profile of a GPU
        return 1.0
    window = max(stop for _, stop in spans) - min(start for start, _ in spans)
    return 1 - covered_s(spans) / window * 1e9


class Installs:
    """Puts installs into real decode steps: sent with one step, installed by the next."""

    def __init__(self, core: EngineCore) -> None:
        self.packed = [version.packed for version in core._host_store][:NUM_INSTALLED]
        self._core, self._tag = core, core._next_tag()
        num_pages = sum(packed.num_pages for packed in self.packed)
        core._residency.evict_for(num_pages)
        pages = core._pool.allocate(num_pages, self._tag)
        if pages is None:
            raise RuntimeError(f"the pool has no {num_pages} pages for adapters to install")
        self._pages = pages
        self._tags = itertools.count(1 << 30)
        self._slots = [1 + core._config.max_adapter_slots - 1 - i for i in range(len(self.packed))]
        self._sent: tuple[AdapterInstall, ...] = ()
        self.num_sent = 0
        self.every, self.at_once, self._step = 1, 1, 0

    def change(self, batch: ScheduledBatch) -> ScheduledBatch:
        self._step += 1
        sends: tuple[AdapterInstall, ...] = ()
        if self._step % self.every == 0:
            sends = tuple(self._make(i) for i in range(self.at_once))
            self.num_sent += len(sends)
        installs = self.take_sent()
        self._sent = sends
        return dataclasses.replace(batch, installs=installs, sends=sends)

    def take_sent(self) -> tuple[AdapterInstall, ...]:
        """What the last step sent, and the next one installs."""
        sent, self._sent = self._sent, ()
        return sent

    def close(self) -> None:
        self._core._pool.free(self._pages, self._tag)

    def _make(self, i: int) -> AdapterInstall:
        i = (self.num_sent + i) % len(self.packed)
        packed = self.packed[i]
        first = sum(p.num_pages for p in self.packed[:i])
        pages = tuple(self._pages[first : first + packed.num_pages])
        return AdapterInstall(self._slots[i], next(self._tags), pages, packed)


def measure_rows(core: EngineCore, rows: int, num_prompt: int) -> dict[str, float]:
    """Contexts grow as it goes: the engine's steps are taken before and after what they are
    compared with.
    """
    names = [f"adapter-{i}" for i in range(rows)]
    decode = Decode(core, num_prompt, rows, names)
    before = decode.step_seconds(NUM_STEPS)
    raw_s = decode.raw_seconds(NUM_STEPS)
    after = decode.step_seconds(NUM_STEPS)
    spans = profiled(lambda: _steps(core, NUM_PROFILED))["kernels"]
    decode.close()
    engine_s = float(np.mean([before, after]))
    return {
        "rows": rows,
        "engine_ms": engine_s * 1e3,
        "engine_max_ms": float(np.max([before, after])) * 1e3,
        "raw_ms": raw_s * 1e3,
        "raw_over_engine": raw_s / engine_s,
        "idle": idle_share(spans),
    }


def _steps(core: EngineCore, num_steps: int) -> None:
    for _ in range(num_steps):
        core.step()


def measure_installs(core: EngineCore, rows: int, num_prompt: int) -> dict[str, float]:
    names = [f"adapter-{i}" for i in range(rows)]
    installs = Installs(core)
    decode = Decode(core, num_prompt, rows, names)

    def compared(every: int, num_steps: int) -> tuple[float, float]:
        """Milliseconds a step with installs every so many, and without: the mean of before and
        after, for contexts grow.
        """
        before = decode.step_seconds(NUM_STEPS)
        decode.change, installs.every = installs.change, every
        busy = decode.step_seconds(num_steps)
        decode.change = lambda batch: dataclasses.replace(batch, installs=installs.take_sent())
        after = decode.step_seconds(NUM_STEPS)
        return float(np.mean(busy)) * 1e3, float(np.mean([before, after])) * 1e3

    alone_s = float(np.mean(decode.step_seconds(NUM_STEPS)))
    every = min(max(1, round(0.05 / alone_s)), MAX_EVERY)
    with_20, alone = compared(every, 4 * every)
    with_each, alone_then = compared(1, NUM_STEPS)
    result = {
        "step_ms": alone,
        "with_20_a_second_ms": with_20,
        "with_one_a_step_ms": with_each,
        "slower_at_20_a_second": with_20 / alone - 1,
        "slower_with_one_a_step": with_each / alone_then - 1,
        "num_installed": installs.num_sent,
    }
    decode.change, installs.every = installs.change, 1
    for at_once in (1, 4):
        installs.at_once = at_once
        decode.step_seconds(2)
        before = installs.num_sent
        copies = profiled(lambda: _steps(core, 6))["copies"]
        num_bytes = (installs.num_sent - before) * installs.packed[0].num_bytes
        if copies:
            result[f"{at_once}_in_flight_gb_s"] = num_bytes / covered_s(copies) / 1e9
            result[f"{at_once}_in_flight_copies"] = len(copies)
    decode.change = lambda batch: batch
    decode.close()
    installs.close()
    return result


def main() -> None:
    args = _parse()
    rows = [int(r) for r in args.rows.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(
            model=write_geometry(args.geometry, Path(scratch)),
            random_weights=True,
            adapters=tuple((f"adapter-{i}", f"random:8:{i}") for i in range(max(rows))),
            max_rank=8,
            max_model_len=args.context + 320,
            max_num_seqs=max(rows),
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_adapter_slots=max(rows) + NUM_INSTALLED,
            pool_bytes=args.pool_bytes,
            compilation_cache_dir=args.cache_dir,
        )
        core, info = build_core(config, lambda *_: None, make_loader=random_adapter_loader)
    result: dict[str, Any] = {
        "bench": "idle", "device": info["device"], "commit": args.commit or commit(),
        "command": command(), "jax": jax.__version__, "geometry": args.geometry,
        "startup_s": info["startup_s"], "num_programs": info["num_programs"],
        "rows": [], "targets": [],
    }  # fmt: skip
    for r in rows:
        measured = measure_rows(core, r, args.context)
        print(measured, flush=True)
        result["rows"].append(measured)
        result["targets"] += row_targets(measured)
    if 64 in rows or args.installs:
        installs = measure_installs(core, min(64, max(rows)), args.context)
        print(installs, flush=True)
        result["installs"] = installs
        result["targets"] += install_targets(installs)
    result["compiles_after_ready"] = core.stats()["runner"]["compiles_after_ready"]
    record(result, args.out)


def row_targets(measured: dict[str, float]) -> list[dict[str, Any]]:
    rows = int(measured["rows"])
    if rows not in MAX_IDLE:
        return []
    return [
        target("9", f"GPU idle between steps, {rows} rows", measured=measured["idle"],
               limit=MAX_IDLE[rows], unit="of the step"),
        target("9", f"engine loop over raw step rate, {rows} rows", limit=0.97, unit="",
               measured=measured["raw_over_engine"], is_minimum=True),
    ]  # fmt: skip


def install_targets(installs: dict[str, float]) -> list[dict[str, Any]]:
    found = [
        target("11", "decode slower at 20 installs a second", limit=0.03, unit="",
               measured=installs["slower_at_20_a_second"]),
    ]  # fmt: skip
    for at_once, limit in ((1, 20), (4, 40)):
        if f"{at_once}_in_flight_gb_s" in installs:
            found.append(
                target("11", f"copies of {at_once} rank-8 adapters a step during decode",
                       measured=installs[f"{at_once}_in_flight_gb_s"], limit=limit, unit="GB/s",
                       is_minimum=True)
            )  # fmt: skip
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-7b")
    parser.add_argument("--rows", default="1,64,256")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024)
    parser.add_argument("--pool-bytes", type=int)
    parser.add_argument("--installs", action="store_true", help="at fewer than 64 rows too")
    parser.add_argument("--cache-dir")
    parser.add_argument("--commit", help="where the tree is not a repository")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
