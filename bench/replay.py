"""A trace through an `EngineCore` in this process, on the machine's clock or a simulated one.

    run = Replay(core, trace, MonotonicClock(), vocab_size=32000).run()
    summarise(run.outcomes)            # of bench.slo: throughput with drain, latencies, SLOs
    run.counters["adapter_installs"], run.steps["decode_adapters"]

Requests are handed in at their moments while the core steps, between two steps, as its own loop
takes them from its inbox; a token's moment is the return of the step that told of it. Adapters
must be loaded: request i asks for the adapter named `adapter_name(i)`. The core and the clock must
read the same time (`EngineCore(..., clock=clock.now)`); a simulated runner lets the clock sleep
until its step has ended, in `collect`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bench.batch_log import BatchLog, StepWork
from bench.clock import Clock
from bench.outcome import Outcome, gap_quantiles
from bench.trace import Request, Trace, prompt_token_ids
from checkpoints.model_config import ModelConfig
from sloraj.core import EngineCore
from sloraj.messages import (
    Abort,
    Dead,
    FromEngine,
    Generate,
    RequestFailed,
    ToEngine,
    TokenOutput,
)

GREEDY = {"temperature": 0.0, "ignore_eos": True, "seed": 0}


class Stepped(Protocol):
    """What is driven: an `EngineCore`, or several that answer as one."""

    @property
    def is_idle(self) -> bool: ...

    def submit(self, message: ToEngine) -> None: ...

    def step(self) -> Sequence[FromEngine]: ...

    def stats(self) -> dict[str, Any]: ...


class ReplayError(RuntimeError):
    """The engine died, or nothing moves although requests are open."""


def default_adapter_name(adapter: int) -> str:
    return f"adapter-{adapter}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What came of a trace."""

    outcomes: list[Outcome]  # in the order of the trace
    counters: dict[str, int]  # of `EngineCore.stats`, over this run; gauges as they are at its end
    steps: dict[str, Any]  # of `BatchLog.summary`
    work: list[StepWork]  # of each step, for `bench.ceiling`


class Replay:
    """One run of a trace, once."""

    def __init__(
        self,
        core: Stepped,
        trace: Trace,
        clock: Clock,
        *,
        vocab_size: int,
        seed: int = 42,
        model: ModelConfig | None = None,
        adapter_name: Callable[[int], str] = default_adapter_name,
        prompt: Callable[[int, Request], list[int]] | None = None,
        fields: Callable[[int, Request], dict[str, Any]] = lambda index, request: {},
        give_up_s: float | None = None,
        keeps_moments: bool = False,
        on_step: Callable[[int], None] = lambda num_ended: None,
    ) -> None:
        """model: to count the weights in the batches by. prompt: token ids of request i; random
        ones of `seed` if None. fields: more of request i's `Generate`, such as its tenant.
        give_up_s: then all that is open is aborted, and the rest not sent. on_step: for progress;
        gets the number of requests that have ended.
        """
        self._core, self._trace, self._clock = core, trace, clock
        self._model, self._give_up_s, self._on_step = model, give_up_s, on_step
        self._keeps_moments = keeps_moments
        draw = prompt or (
            lambda i, request: prompt_token_ids(
                seed, i, request.num_prompt_tokens, vocab_size
            ).tolist()
        )
        self._messages = [
            Generate(
                request_id=f"replay-{i}",
                prompt_token_ids=draw(i, request),
                params=GREEDY | {"max_tokens": request.num_output_tokens},
                adapter_id=None if request.adapter is None else adapter_name(request.adapter),
                **fields(i, request),
            )
            for i, request in enumerate(trace)
        ]
        self._outcomes = [Outcome.of(i, request) for i, request in enumerate(trace)]
        self._moments: dict[int, list[float]] = {}  # of the tokens, of open requests
        self._num_sent = self._num_ended = 0
        self._origin_s = 0.0

    def run(self) -> ReplayResult:
        """From the start of the trace to the end of its last request.

        Raises ReplayError if the engine dies.
        """
        before = self._core.stats()
        log = BatchLog(self._core, self._model) if isinstance(self._core, EngineCore) else None
        self._origin_s = self._clock.now()
        try:
            while self._num_ended < len(self._trace):
                self._advance()
        finally:
            if log is not None:
                log.close()
        return ReplayResult(
            outcomes=self._outcomes,
            counters=_counters(before, self._core.stats()),
            steps={} if log is None else log.summary(),
            work=[] if log is None else log.steps,
        )

    def _advance(self) -> None:
        now_s = self._clock.now() - self._origin_s
        if self._give_up_s is not None and now_s >= self._give_up_s:
            self._give_up(now_s)
            return
        self._send_due(now_s)
        if self._core.is_idle:
            if self._num_sent == len(self._trace):
                raise ReplayError(f"idle with {len(self._moments)} requests open")
            self._clock.sleep_until(self._origin_s + self._trace[self._num_sent].arrival_s)
            return
        self._take(self._core.step())
        self._on_step(self._num_ended)

    def _send_due(self, now_s: float) -> None:
        while self._num_sent < len(self._trace):
            index = self._num_sent
            if self._trace[index].arrival_s > now_s:
                return
            self._outcomes[index].sent_s = round(now_s, 6)
            self._moments[index] = []
            self._core.submit(self._messages[index])
            self._num_sent += 1

    def _take(self, messages: Sequence[FromEngine]) -> None:
        now_s = round(self._clock.now() - self._origin_s, 6)
        for message in messages:
            if isinstance(message, TokenOutput):
                index = _index(message.request_id)
                moments = self._moments.get(index)
                if moments is None:
                    continue  # of a request of somebody else, or one given up
                moments += [now_s] * len(message.token_ids)
                if message.finish_reason is not None:
                    self._outcomes[index].finish_reason = message.finish_reason
                    self._end(index, now_s)
            elif isinstance(message, RequestFailed):
                index = _index(message.request_id)
                error = message.error
                self._outcomes[index].retry_after_s = error.get("retry_after_s")
                self._outcomes[index].error = f"{error['kind']}: {error['message']}"
                self._end(index, now_s)
            elif isinstance(message, Dead):
                raise ReplayError(message.reason)

    def _end(self, index: int, now_s: float) -> None:
        outcome, moments = self._outcomes[index], self._moments.pop(index, [])
        outcome.ended_s = now_s
        outcome.num_output_tokens = len(moments)
        if moments:
            outcome.first_token_s, outcome.last_token_s = moments[0], moments[-1]
            outcome.gaps_s = gap_quantiles(moments)
            outcome.token_s = moments if self._keeps_moments else None
        self._num_ended += 1

    def _give_up(self, now_s: float) -> None:
        """Abort what is open, and let the core forget it; the rest counts as given up, unsent."""
        for index in [*self._moments, *range(self._num_sent, len(self._trace))]:
            if index in self._moments:
                self._core.submit(Abort(request_id=self._messages[index].request_id))
            self._outcomes[index].error = f"given_up: not ended after {self._give_up_s:g} s"
            self._end(index, round(now_s, 6))
        while not self._core.is_idle:
            self._take(self._core.step())


def _index(request_id: str) -> int:
    return int(request_id.rpartition("-")[2])


def _counters(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """What was counted in between, by the core and by its runner; of gauges (num_..., ..._bytes of
    the host) the last value.
    """
    found: dict[str, int] = {}
    for prefix, first, last in (
        ("", before, after), ("runner_", before["runner"], after["runner"]),
    ):  # fmt: skip
        for name, value in last.items():
            if isinstance(value, int) and not isinstance(value, bool):
                is_gauge = name.startswith(("num_", "host_"))
                found[prefix + name] = value if is_gauge else value - first.get(name, 0)
    return found
