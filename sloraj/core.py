"""The engine core: messages in, messages out, and the step between them in four verbs.

    schedule ──> execute ──> update ──> emit
    step N+1     step N+1    step N     tokens of step N

It runs one step ahead: step N+1 is enqueued before the tokens of step N are read, so the device
never waits for the host. All state belongs to the one thread that calls `step` or `run`; `submit`
may be called from any thread.
"""

from __future__ import annotations

import itertools
import logging
import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any

from sloraj.adapters.calls import AdapterCalls
from sloraj.adapters.host_store import HostStore
from sloraj.adapters.loader import AdapterLoader, LoadDone, LoadFunction
from sloraj.adapters.registry import AdapterRegistry
from sloraj.adapters.residency import Residency
from sloraj.adapters.retention import RETENTION_POLICIES
from sloraj.batch import Runner
from sloraj.config import SchedulerConfig
from sloraj.errors import EngineUnavailable, InternalError, SlorajError, from_wire
from sloraj.live_requests import LiveRequests
from sloraj.messages import (
    Abort,
    Dead,
    Drain,
    FromEngine,
    Generate,
    GetStats,
    Heartbeat,
    ListAdapters,
    LoadAdapter,
    Reply,
    RequestFailed,
    Shutdown,
    ToEngine,
    UnloadAdapter,
)
from sloraj.pages import PagePool
from sloraj.scheduler import Scheduler
from sloraj.step_time import StepTimes

HEARTBEAT_S = 1.0
_log = logging.getLogger(__name__)


class EngineCore:
    """Drives a runner. `load_adapter(path)` reads and packs an adapter, in worker threads;
    `close_load()` ends what it needs for that.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        runner: Runner,
        load_adapter: LoadFunction,
        *,
        clock: Callable[[], float] = time.monotonic,
        loader_executor: Executor | None = None,
        close_load: Callable[[], None] | None = None,
    ) -> None:
        self._config = config
        self._runner = runner
        self._clock = clock
        self._next_tag = itertools.count(1).__next__  # for sequences and versions alike
        self._pool = PagePool(config.num_pages)
        self._host_store = HostStore(config.host_adapter_bytes, self._next_tag)
        self._residency = Residency(
            self._pool,
            config.max_adapter_slots,
            clock,
            RETENTION_POLICIES[config.retention](),
            num_reserved_pages=config.num_adapter_pages,
        )
        self._registry = AdapterRegistry(
            self._host_store,
            self._residency,
            max_rank=config.max_rank,
            num_usable_pages=self._pool.num_usable,
        )
        self._step_times = StepTimes(clock, self._residency.slot_bytes, config.token_buckets)
        self._scheduler = Scheduler(
            config, self._pool, self._residency, self._host_store, clock, self._step_times
        )
        self._inbox: queue.SimpleQueue[tuple[ToEngine | LoadDone, float]] = queue.SimpleQueue()
        self._outbox: list[FromEngine] = []
        self._adapter_calls = AdapterCalls(
            self._registry,
            self._residency,
            AdapterLoader(load_adapter, self._put, loader_executor, close_load),
            self._post,
        )
        self._requests = LiveRequests(
            config, self._registry, self._scheduler, clock, self._next_tag, self._post
        )
        self._drains: list[int] = []
        self._enqueued: Any = None  # handle of the step whose tokens are not read yet
        self._is_draining = False
        self._is_stopped = False

    # --- for other threads ---

    def submit(self, message: ToEngine) -> None:
        """Queue a message for the next step. Thread-safe. After the end nothing is answered.

        A request arrives now: the step that runs meanwhile is part of its waiting.
        """
        self._put(message)

    def _put(self, message: ToEngine | LoadDone) -> None:
        self._inbox.put((message, self._clock()))

    def _post(self, message: FromEngine) -> None:
        self._outbox.append(message)

    def preload(self, adapters: Iterable[tuple[str, str]], report: Callable[[int], None]) -> None:
        """Load (adapter_id, path) pairs before the loop runs; `report` gets the number done.

        Raises what the first bad one is refused with.
        """
        loads = [
            LoadAdapter(call_id=call_id, adapter_id=adapter_id, path=path)
            for call_id, (adapter_id, path) in enumerate(adapters)
        ]
        for load in loads:
            self.submit(load)
        pending = {load.call_id for load in loads}
        while pending:
            self._wait(HEARTBEAT_S)
            messages = self.step()
            if self._is_stopped:
                raise InternalError("the engine failed while it loaded adapters")
            for message in messages:
                if isinstance(message, Reply) and message.call_id in pending:
                    if message.error is not None:
                        raise from_wire(message.error)
                    pending.remove(message.call_id)
                    report(len(loads) - len(pending))

    # --- the loop ---

    @property
    def is_idle(self) -> bool:
        """Nothing to compute and nothing to read: only a message can bring work."""
        return self._enqueued is None and self._scheduler.is_idle and self._inbox.empty()

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def run(self, emit: Callable[[list[FromEngine]], None]) -> None:
        """Step until Shutdown or a fault (Dead comes last); block on the inbox while idle."""
        next_beat = self._clock()
        while not self._is_stopped:
            if self.is_idle:
                self._wait(max(next_beat - self._clock(), 0.0))
            messages = self.step()
            if self._clock() >= next_beat and not self._is_stopped:
                next_beat = self._clock() + HEARTBEAT_S
                messages.append(self.heartbeat())
            if messages:
                emit(messages)

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            step=self._scheduler.num_steps,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
        )

    def step(self) -> list[FromEngine]:
        """Take in all messages, enqueue one step, read the one before it; what there is to tell.

        A fault ends the engine: every request and call fails with InternalError, and Dead comes
        last.
        """
        if not self._is_stopped:
            try:
                self._take_messages()
                if not self._is_stopped:
                    self._advance()
                    self._answer_waiting_calls()
            except Exception as error:
                self._die(error)
        messages, self._outbox = self._outbox, []
        return messages

    def _advance(self) -> None:
        self._requests.drop_late()
        batch = self._scheduler.schedule()
        handle = None
        if batch is not None:
            self._step_times.enqueue(batch)
            handle = self._runner.execute(batch)
        elif self._enqueued is None and not self._scheduler.is_idle:
            raise InternalError("sequences wait, nothing runs, and none can be scheduled")
        self._read_enqueued()
        self._enqueued = handle

    def _read_enqueued(self) -> None:
        if self._enqueued is None:
            return
        handle, self._enqueued = self._enqueued, None
        result = self._runner.collect(handle)
        self._step_times.read()
        if result.owner_violations:
            raise InternalError(f"{result.owner_violations} rows would have read another's pages")
        for event in self._scheduler.update(result):
            self._requests.emit(event)

    def _wait(self, timeout_s: float) -> None:
        try:
            message, arrival_s = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        try:
            self._take(message, arrival_s)
        except Exception as error:
            self._die(error)

    def _take_messages(self) -> None:
        while not self._is_stopped:
            try:
                message, arrival_s = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._take(message, arrival_s)

    def _take(self, message: ToEngine | LoadDone, arrival_s: float) -> None:
        match message:
            case Generate():
                refusal = None
                if self._is_draining:
                    refusal = EngineUnavailable(
                        "the engine is draining and accepts no new requests"
                    )
                self._requests.start(message, arrival_s, refusal)
            case Abort():
                self._requests.cancel(message.request_id)
            case LoadAdapter():
                self._adapter_calls.load(message)
            case LoadDone():
                self._adapter_calls.finish_load(message)
            case UnloadAdapter():
                self._adapter_calls.unload(message)
            case ListAdapters():
                self._adapter_calls.list_adapters(message)
            case GetStats():
                self._outbox.append(Reply(call_id=message.call_id, value=self.stats()))
            case Drain():
                self._is_draining = True
                self._drains.append(message.call_id)
            case Shutdown():
                self._shut_down(EngineUnavailable("the engine was shut down"))

    # --- calls ---

    def stats(self) -> dict[str, Any]:
        """Gauges and counters since the start; `runner` holds the runner's own."""
        scheduler, residency = self._scheduler, self._residency
        return {
            "num_running": scheduler.num_running,
            "num_waiting": scheduler.num_waiting,
            "num_leases": sum(version.num_leases for version in self._host_store),
            "num_pages": self._pool.num_usable,
            "num_pages_free": self._pool.num_free,
            "num_pages_adapters": residency.num_pages,
            "num_pages_adapters_idle": residency.num_idle_pages,
            "num_adapters": len(self._registry),
            "num_adapters_draining": self._registry.num_draining,
            "num_adapter_versions": len(self._host_store),
            "num_adapters_resident": residency.num_residents,
            "host_adapter_bytes": self._host_store.num_bytes,
            "adapter_installs": residency.num_installs,
            "adapter_evictions": residency.num_evictions,
            "preemptions": scheduler.num_preemptions,
            "steps": scheduler.num_steps,
            "computed_tokens": scheduler.num_computed_tokens,
            "sampled_tokens": scheduler.num_sampled_tokens,
            "is_draining": self._is_draining,
            "adapters": residency.stats(),
            "step": self._step_times.stats(),
            **self._requests.stats(),
            "queue": scheduler.queue_stats(),
            "runner": self._runner.stats(),
        }

    def _answer_waiting_calls(self) -> None:
        self._adapter_calls.answer_unloaded()
        if self._drains and not self._requests:
            self._outbox.extend(Reply(call_id=call_id) for call_id in self._drains)
            self._drains.clear()

    # --- the end ---

    def _shut_down(self, error: SlorajError) -> None:
        self._requests.fail_all(error)
        self._adapter_calls.answer_unloaded()
        self._stop(error)

    def _stop(self, error: SlorajError) -> None:
        """Fail every request and every open call, and end. Frees nothing: a fault may have hit."""
        self._is_stopped = True
        self._enqueued = None
        self._adapter_calls.close(error)
        wire = error.to_wire()
        self._requests.abandon(error)
        self._outbox.extend(Reply(call_id=c, error=wire) for c in self._drains)
        self._drains.clear()
        while not self._inbox.empty():
            message, _ = self._inbox.get()
            if isinstance(message, Generate):
                self._outbox.append(RequestFailed(request_id=message.request_id, error=wire))
            elif not isinstance(message, LoadDone | Abort | Shutdown):
                self._outbox.append(Reply(call_id=message.call_id, error=wire))

    def _die(self, error: Exception) -> None:
        _log.error("the engine failed", exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        self._stop(InternalError(f"the engine failed: {reason}"))
        wire = error.to_wire() if isinstance(error, SlorajError) else None
        self._outbox.append(Dead(reason=reason, error=wire))

    def check_integrity(self) -> None:
        """Raise InternalError unless pages, slots, rows, pins and leases all add up."""
        self._pool.check_integrity()
        self._host_store.check_integrity()
        self._residency.check_integrity()
        self._registry.check_integrity()
        self._scheduler.check_integrity()
        leases = self._requests.leases()
        for version in self._host_store:
            held = leases.pop(version.version_id, 0)
            if held != version.num_leases:
                raise InternalError(
                    f"{version.version_id}: {held} leases held, {version.num_leases} counted"
                )
        if leases:
            raise InternalError(f"leases on versions that are gone: {sorted(leases)}")
