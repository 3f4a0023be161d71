"""The requests that the engine core has taken and not yet answered whole.

Each holds a lease on its adapter and one sequence for each of its choices; all of it is given back
when the request ends, however that comes about.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from sloraj.adapters.registry import AdapterRegistry, Registration
from sloraj.admission import make_sequences, resolve_slo, tenant_of
from sloraj.batch import TokenLogprobs
from sloraj.config import SchedulerConfig
from sloraj.errors import (
    FirstTokenTooLate,
    InternalError,
    InvalidRequest,
    QueueFull,
    SlorajError,
)
from sloraj.messages import FromEngine, Generate, RequestFailed, TokenOutput
from sloraj.request import Sequence
from sloraj.scheduler import Scheduler, TokenEvent
from sloraj.slo import SloCounts

MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


@dataclasses.dataclass(slots=True, eq=False)
class LiveRequest:
    request_id: str
    sequences: list[Sequence]
    lease: Registration | None
    num_unfinished: int
    arrival_s: float
    slo_s: float | None  # to the first token
    first_token_after_s: float | None = None


class LiveRequests:
    """Owned by the core; tells the outcome of each through `post`."""

    def __init__(
        self,
        config: SchedulerConfig,
        registry: AdapterRegistry,
        scheduler: Scheduler,
        clock: Callable[[], float],
        next_tag: Callable[[], int],
        post: Callable[[FromEngine], None],
    ) -> None:
        self._config = config
        self._registry = registry
        self._scheduler = scheduler
        self._clock = clock
        self._next_tag = next_tag
        self._post = post
        self._requests: dict[str, LiveRequest] = {}
        self._num_finished = 0
        self._num_failed = 0
        self._num_aborted = 0
        self._mean_service_s = 1.0  # of finished requests, the last ones counting most
        self._slo_counts = SloCounts()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(self._requests.values())

    # --- the beginning ---

    def start(self, message: Generate, arrival_s: float, refusal: SlorajError | None) -> None:
        """Lease the adapter and queue the sequences, or tell why not; `refusal`: not at all."""
        lease = None
        try:
            if refusal is not None:
                raise refusal
            self._require_accepting(message)
            slo_s = resolve_slo(message, self._config)
            if message.adapter_id is not None:
                lease = self._registry.acquire(message.adapter_id)
            version = None if lease is None else lease.version
            sequences = make_sequences(message, version, self._config, self._next_tag, arrival_s)
        except SlorajError as error:
            if lease is not None:
                self._registry.release(lease)
            self._num_failed += 1
            if isinstance(error, QueueFull):
                self._slo_counts.judge(None, message.first_token_slo_s or self._default_slo_s)
            self._post(RequestFailed(request_id=message.request_id, error=error.to_wire()))
            return
        request = LiveRequest(
            message.request_id, sequences, lease, len(sequences), arrival_s, slo_s
        )
        self._requests[message.request_id] = request
        for sequence in sequences:
            sequence.deadline_s = math.inf if slo_s is None else arrival_s + slo_s
            self._scheduler.add(sequence)

    @property
    def _default_slo_s(self) -> float | None:
        return self._config.first_token_slo_s

    def _require_accepting(self, message: Generate) -> None:
        if message.request_id in self._requests:
            raise InvalidRequest(
                f"request_id: got {message.request_id!r}, allowed: one that is not running",
                param="request_id",
            )
        self._require_room(
            self._scheduler.num_waiting, self._config.max_num_waiting, "are", "--max-num-waiting"
        )
        tenant_limit = self._config.queue.tenant_max_waiting
        if tenant_limit is not None:
            num_waiting = self._scheduler.num_waiting_of(tenant_of(message))
            self._require_room(
                num_waiting, tenant_limit, "of this tenant are", "--tenant-max-waiting"
            )

    def _require_room(self, num_waiting: int, limit: int, are: str, flag: str) -> None:
        if num_waiting >= limit:
            turns = num_waiting / self._config.max_num_seqs
            raise QueueFull(
                f"{num_waiting} requests {are} waiting, allowed: {limit} ({flag})",
                retry_after_s=_retry_after_s(turns * self._mean_service_s),
            )

    # --- on the way ---

    def emit(self, event: TokenEvent) -> None:
        """Tell of a token, and end the request with the last token of its last choice."""
        sequence = event.sequence
        request = self._requests.get(sequence.request_id)
        if request is None:
            return  # another of its choices has just failed
        if not event.is_finite:
            self.fail(request, InternalError("the model's logits were not finite"))
            return
        if request.first_token_after_s is None:
            request.first_token_after_s = self._clock() - request.arrival_s
            for choice in request.sequences:
                choice.deadline_s = math.inf  # met or missed: it is never given up from here on
        self._post(
            TokenOutput(
                request_id=sequence.request_id,
                index=sequence.index,
                token_ids=[] if event.token_id is None else [event.token_id],
                logprobs=None if event.logprobs is None else [_plain(event.logprobs)],
                finish_reason=event.finish_reason,
                stop_token_id=event.stop_token_id,
                num_prompt_tokens=sequence.num_prompt_tokens,
                adapter_version=sequence.version_id,
            )
        )
        if event.finish_reason is not None:
            request.num_unfinished -= 1
            if request.num_unfinished == 0:
                self._num_finished += 1
                service_s = self._clock() - request.arrival_s
                self._mean_service_s += 0.1 * (service_s - self._mean_service_s)
                self._slo_counts.judge(request.first_token_after_s, request.slo_s)
                self._release(request)

    def drop_late(self) -> None:
        """Refuse what the scheduler does not expect to answer in time."""
        for sequence, first_token_s, retry_after_s in self._scheduler.too_late():
            request = self._requests.get(sequence.request_id)
            if request is None or request.slo_s is None:
                continue  # another of its choices has been dropped with it
            self._slo_counts.aborted += 1
            after_s = first_token_s - request.arrival_s
            error = FirstTokenTooLate(
                f"first_token_slo_s: the first token is expected {after_s:.2f} s after arrival, "
                f"allowed: within {request.slo_s:g} s; the server is overloaded",
                retry_after_s=_retry_after_s(retry_after_s),
            )
            self.fail(request, error)

    # --- the end ---

    def cancel(self, request_id: str) -> None:
        """The client has gone, or has what it wanted. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        self._num_aborted += 1
        waited_s = self._clock() - request.arrival_s
        is_late = request.slo_s is not None and waited_s >= request.slo_s
        if request.first_token_after_s is not None or is_late:
            self._slo_counts.judge(request.first_token_after_s, request.slo_s)
        self._release(request)

    def fail(self, request: LiveRequest, error: SlorajError) -> None:
        self._num_failed += 1
        self._slo_counts.judge(None, request.slo_s)
        self._release(request)
        self._post(RequestFailed(request_id=request.request_id, error=error.to_wire()))

    def fail_all(self, error: SlorajError) -> None:
        for request in list(self._requests.values()):
            self.fail(request, error)

    def abandon(self, error: SlorajError) -> None:
        """Tell all of them, and free nothing: a fault may have hit what they hold."""
        for request_id in self._requests:
            self._post(RequestFailed(request_id=request_id, error=error.to_wire()))
        self._requests.clear()

    def _release(self, request: LiveRequest) -> None:
        """Free all that a request holds: rows, pages and pins first, then the lease."""
        del self._requests[request.request_id]
        for sequence in request.sequences:
            self._scheduler.abort(sequence)
        if request.lease is not None:
            self._registry.release(request.lease)

    # --- figures ---

    def stats(self) -> dict[str, Any]:
        return {
            "num_requests": len(self._requests),
            "finished_requests": self._num_finished,
            "failed_requests": self._num_failed,
            "aborted_requests": self._num_aborted,
            "first_token_slo": self._slo_counts.stats(),
        }

    def leases(self) -> dict[str, int]:
        """Leases held, by version."""
        held = itertools.groupby(
            sorted(r.lease.version.version_id for r in self._requests.values() if r.lease)
        )
        return {version_id: len(list(leases)) for version_id, leases in held}


def _retry_after_s(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)


def _plain(logprobs: TokenLogprobs) -> list[Any]:
    """[token_id, logprob, [[token_id, logprob], ...]]"""
    return [logprobs.token_id, logprobs.logprob, [list(pair) for pair in logprobs.top]]
