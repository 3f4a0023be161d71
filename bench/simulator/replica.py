"""One replica: an engine core on a simulated clock, its host tier, and the requests it was sent.

    replica.send(index, request)        # in order of arrival
    replica.run_until(12.5)             # all that happens before 12.5 s
    replica.ended                       # outcomes, by index, of what has ended

The core is the real one; only its runner and its clock are simulated. A step that begins before the
given moment is finished after it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

from bench.clock import SimulatedClock
from bench.outcome import Outcome
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import AdapterSizes, EngineDescription, simulated_core
from bench.simulator.fast_forward import FastForward
from bench.simulator.host_tier import HostCache, HostTier
from bench.trace import Request
from sloraj.messages import (
    Dead,
    FromEngine,
    Generate,
    RequestFailed,
    TokenOutput,
)

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "seed": 0}
NEVER_S = float("inf")


class ReplicaDied(RuntimeError):
    """The simulated engine failed, or refused what it must take."""


class Replica:
    """`rank_of(adapter)` says how large an adapter is; it is asked when one is first needed."""

    def __init__(
        self,
        description: EngineDescription,
        model: DeviceModel,
        rank_of: Callable[[int], int],
        *,
        tier: HostTier,
        sizes: AdapterSizes | None = None,
        is_fast: bool = True,
    ) -> None:
        self.clock = SimulatedClock()
        self.tier = tier
        self.host = HostCache(tier.capacity_bytes)
        self._sizes = sizes or AdapterSizes(description.model, description.layout)
        self.core = simulated_core(description, model, self.clock, sizes=self._sizes)
        self._rank_of = rank_of
        self.fast_forward = FastForward(self.core) if is_fast else None
        self._arrivals: collections.deque[tuple[int, Request]] = collections.deque()
        self.open: dict[str, Outcome] = {}
        self.ended: dict[int, Outcome] = {}
        self._first_s: dict[str, float] = {}
        self._held: dict[int, list[Generate]] = {}  # by adapter that is being fetched
        self._fetching: collections.deque[tuple[float, int]] = collections.deque()  # ends, adapters
        self._registered: set[int] = set()
        self._uses: collections.Counter[int] = collections.Counter()  # open requests
        self._link_free_s = 0.0
        self.num_fetches = 0
        self.fetched_bytes = 0

    @property
    def num_open(self) -> int:
        """Requests sent and not ended."""
        return len(self.open) + len(self._arrivals)

    def send(self, index: int, request: Request) -> None:
        """A request that arrives at `request.arrival_s`, later than all that were sent before."""
        self._arrivals.append((index, request))

    def bytes_of(self, adapter: int) -> int:
        return self._sizes.packed("", self._rank_of(adapter)).num_bytes

    def still_open(self) -> list[Outcome]:
        """Outcomes so far of the requests that have not ended, with the error "open"."""
        found = []
        for request_id, outcome in self.open.items():
            first_s = self._first_s.get(request_id)
            found.append(dataclasses.replace(outcome, error="open", first_token_s=first_s))
        found += [
            dataclasses.replace(Outcome.of(index, request), error="open")
            for index, request in self._arrivals
        ]
        return found

    def run_until(self, until_s: float) -> None:
        """Let all happen that begins before `until_s`."""
        while self._next(until_s):
            pass

    def _next(self, until_s: float) -> bool:
        clock, core = self.clock, self.core
        now_s = clock.now()
        while self._arrivals and self._arrivals[0][1].arrival_s <= now_s:
            self._arrive(*self._arrivals.popleft())
        self._finish_fetches(now_s)
        event_s = self._arrivals[0][1].arrival_s if self._arrivals else NEVER_S
        if self._fetching:
            event_s = min(event_s, self._fetching[0][0])
        if core.is_idle:
            if event_s >= until_s:
                return False
            clock.sleep_until(event_s)
            return True
        if now_s >= until_s:
            return False
        if self.fast_forward is not None and self.fast_forward.run(min(event_s, until_s)):
            return True
        self._take(core.step())
        return True

    def _arrive(self, index: int, request: Request) -> None:
        outcome = Outcome.of(index, request)
        outcome.sent_s = self.clock.now()
        request_id = str(index)
        self.open[request_id] = outcome
        adapter = request.adapter
        generate = Generate(
            request_id=request_id,
            prompt_token_ids=[0] * request.num_prompt_tokens,
            params=GREEDY | {"max_tokens": request.num_output_tokens},
            adapter_id=None if adapter is None else str(adapter),
        )
        if adapter is None:
            self.core.submit(generate)
            return
        self._uses[adapter] += 1
        num_bytes = self.bytes_of(adapter)
        is_here = self.host.use(adapter, num_bytes)
        if adapter in self._held:
            self._held[adapter].append(generate)
        elif is_here:
            if adapter not in self._registered:  # it was there before the simulation began
                self._register(adapter)
            self.core.submit(generate)
        else:
            self._held[adapter] = [generate]
            self._fetch(adapter, num_bytes)
            self._make_room()

    def _fetch(self, adapter: int, num_bytes: int) -> None:
        now_s, tier = self.clock.now(), self.tier
        begun_s = max(now_s + tier.fetch_latency_s, self._link_free_s)
        self._link_free_s = begun_s + num_bytes / tier.fetch_bytes_per_s
        self._fetching.append((self._link_free_s + tier.load_s, adapter))
        self.num_fetches += 1
        self.fetched_bytes += num_bytes

    def _finish_fetches(self, now_s: float) -> None:
        while self._fetching and self._fetching[0][0] <= now_s:
            _, adapter = self._fetching.popleft()
            self._register(adapter)
            for generate in self._held.pop(adapter):
                self.core.submit(generate)

    def _register(self, adapter: int) -> None:
        registry, name, rank = self.core._registry, str(adapter), self._rank_of(adapter)
        registry.begin_load(name, replace=False)
        packed = self._sizes.packed(name, rank)
        registry.finish_load(name, name, packed, is_pinned=False, loaded_at=0.0)
        self._registered.add(adapter)

    def _make_room(self) -> None:
        registry = self.core._registry
        for adapter in self.host.make_room(self._uses.__contains__):
            if adapter in self._registered:
                self._registered.remove(adapter)
                registry.begin_unload(str(adapter))
        registry.take_unloaded()  # nobody held them: they are gone

    def _take(self, messages: list[FromEngine]) -> None:
        now_s = self.clock.now()
        for message in messages:
            if isinstance(message, TokenOutput):
                self._first_s.setdefault(message.request_id, now_s)
                if message.finish_reason is not None:
                    self._end(message.request_id, now_s)
            elif isinstance(message, RequestFailed):
                self.open[message.request_id].error = f"{message.error['kind']}: refused"
                self._end(message.request_id, now_s)
            elif isinstance(message, Dead):
                raise ReplicaDied(str(message))

    def _end(self, request_id: str, now_s: float) -> None:
        outcome = self.open.pop(request_id)
        outcome.ended_s = now_s
        if outcome.error is None:
            outcome.first_token_s, outcome.last_token_s = self._first_s.pop(request_id), now_s
            outcome.num_output_tokens = outcome.num_wanted_tokens
        if outcome.adapter is not None:
            self._uses[outcome.adapter] -= 1
            if not self._uses[outcome.adapter]:
                del self._uses[outcome.adapter]
        self.ended[outcome.index] = outcome
