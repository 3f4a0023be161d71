"""One run of requests on a core, all at once, to the end: what it took and where the time went."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.step_log import StepLog, Verbs
from sloraj.core import EngineCore
from sloraj.messages import Dead, Generate, LoadAdapter, Reply, RequestFailed, TokenOutput


@dataclasses.dataclass(slots=True)
class Timings:
    """Seconds of one request, from the start of the run."""

    first_token_s: float = 0.0
    last_token_s: float = 0.0
    num_tokens: int = 0


@dataclasses.dataclass(slots=True)
class Run:
    """The requests of one run, and what became of them."""

    core: EngineCore
    requests: list[Generate]
    paths: Mapping[str, str]  # of adapters to load when a request first names them
    timings: dict[str, Timings] = dataclasses.field(default_factory=dict)
    held: dict[int, list[Generate]] = dataclasses.field(default_factory=dict)  # by load

    def start(self) -> None:
        """Submit all; a request whose adapter must be loaded first follows its load."""
        call_ids: dict[str, int] = {}
        for request in self.requests:
            self.timings[request.request_id] = Timings()
            path = self.paths.get(request.adapter_id or "")
            if path is None or request.adapter_id is None:
                self.core.submit(request)
                continue
            name = request.adapter_id
            if name not in call_ids:
                call_ids[name] = len(call_ids)
                self.held[call_ids[name]] = []
                self.core.submit(LoadAdapter(call_id=call_ids[name], adapter_id=name, path=path))
            self.held[call_ids[name]].append(request)

    def finish(self) -> tuple[float, StepLog]:
        """Step until every request has finished: seconds, and what the steps took."""
        log = StepLog(self.core)
        num_open = len(self.requests)
        started = time.perf_counter()
        self.start()
        while num_open:
            if self.core.is_idle:
                self.core._wait(1.0)  # for a load
            messages = self.core.step()
            now = time.perf_counter() - started
            log.end_step(now)
            for message in messages:
                if isinstance(message, TokenOutput):
                    timing = self.timings[message.request_id]
                    timing.first_token_s = timing.first_token_s or now
                    timing.last_token_s = now
                    timing.num_tokens += len(message.token_ids)
                    num_open -= message.finish_reason is not None
                elif isinstance(message, Reply) and message.error is None:
                    for request in self.held.pop(message.call_id):
                        self.core.submit(request)
                elif isinstance(message, RequestFailed | Dead | Reply):
                    raise RuntimeError(str(message))
        log.close()
        return time.perf_counter() - started, log


def run_requests(
    core: EngineCore,
    prompts: np.ndarray,
    adapters: list[str | None],
    num_output: int,
    tag: str,
    paths: Mapping[str, str],
) -> dict[str, Any]:
    """Submit every request at once and step until all have finished."""
    params = {"max_tokens": num_output, "temperature": 0.0, "ignore_eos": True, "seed": 0}
    requests = [
        Generate(
            request_id=f"{tag}-{i}", prompt_token_ids=prompt.tolist(), params=params,
            adapter_id=adapter,
        )
        for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True))
    ]  # fmt: skip
    run = Run(core, requests, paths)
    before, verbs = core.stats(), Verbs(core)
    wall_s, log = run.finish()
    verbs.close()
    return {
        **_summary(core, before, run.timings, wall_s, prompts.size),
        "num_distinct_adapters": len({name for name in adapters if name is not None}),
        "buckets": log.table(),
        "verbs_s": verbs.take(),
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
    counters = ("steps", "preemptions", "adapter_installs", "adapter_evictions", "computed_tokens")
    padding = after["runner"]["padding_tokens"] - before["runner"]["padding_tokens"]
    computed = after["computed_tokens"] - before["computed_tokens"]
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
        "padding_over_computed_tokens": padding / computed,
        "num_adapters_resident": after["num_adapters_resident"],
        "num_pages_free": after["num_pages_free"],
        "num_pages_adapters": after["num_pages_adapters"],
        "compiles_after_ready": after["runner"]["compiles_after_ready"],
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
