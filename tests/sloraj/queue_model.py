"""The waiting queue by brute force: what `sloraj.policies` must agree with. Lists, sums and sorts;
nothing is indexed, and nothing is shared with the code under test.
"""

from __future__ import annotations

import dataclasses

from sloraj.policies.settings import QueueConfig
from sloraj.request import SamplingParams, Sequence


def new_sequence(
    tag: int,
    *,
    tenant: str = "",
    version_id: str | None = None,
    priority: int = 0,
    arrival_s: float = 0.0,
    num_prompt: int = 1,
    adapter_bytes: int = 0,
) -> Sequence:
    return Sequence(
        request_id=f"r{tag}",
        index=0,
        prompt_token_ids=[1] * num_prompt,
        params=SamplingParams(),
        max_output_tokens=100,
        stop_ids=frozenset(),
        seed=0,
        tag=tag,
        version_id=version_id,
        arrival_s=arrival_s,
        priority=priority,
        tenant=tenant,
        adapter_bytes=adapter_bytes,
    )


@dataclasses.dataclass
class QueueModel:
    """One queue. The base model's weights are `base_bytes`, a row without adapter reads as much."""

    settings: QueueConfig
    base_bytes: int
    now_s: float = 0.0
    new: list[Sequence] = dataclasses.field(default_factory=list)
    preempted: list[Sequence] = dataclasses.field(default_factory=list)
    running: list[Sequence] = dataclasses.field(default_factory=list)
    on_device: set[str] = dataclasses.field(default_factory=set)
    counters: dict[str, float] = dataclasses.field(default_factory=dict)
    last: str | None = None
    overtakes: int = 0
    overtakes_at_arrival: dict[int, int] = dataclasses.field(default_factory=dict)

    def copy(self) -> QueueModel:
        return dataclasses.replace(
            self, new=list(self.new), preempted=list(self.preempted), running=list(self.running),
            on_device=set(self.on_device), counters=dict(self.counters),
        )  # fmt: skip

    # --- what happens ---

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        if not any(s.tenant == tenant for s in self.new):
            waiting = [self.counters[s.tenant] for s in self.new]
            least = min(waiting) if waiting else self.counters.get(self.last or "", 0.0)
            floor = self.level(least)
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)
        self.overtakes_at_arrival[sequence.tag] = self.overtakes
        self.new.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        if sequence in self.preempted:
            self.preempted.remove(sequence)
            return
        self.new.remove(sequence)
        if not self.new:
            self.last = sequence.tenant

    def preempt(self) -> Sequence:
        self.preempted.insert(0, self.running.pop())
        return self.preempted[0]

    def admit(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        if sequence in self.preempted:
            self.preempted.remove(sequence)
        else:
            self.overtakes += sequence is not self.in_turn()
            loaded = self.loaded_bytes(sequence)
            settings = self.settings
            share = sequence.adapter_bytes / self.base_bytes
            cost = len(sequence.prompt_token_ids) * settings.prompt_token_cost
            cost *= 1 + settings.adapter_cost * share
            cost += settings.adapter_load_cost * loaded / self.base_bytes
            self.remove(sequence)
            self.counters[sequence.tenant] += cost / self.weight(sequence.tenant)
        if sequence.version_id is not None:
            self.on_device.add(sequence.version_id)

    def sample(self, sequence: Sequence) -> None:
        share = sequence.adapter_bytes / self.base_bytes
        cost = self.settings.output_token_cost * (1 + self.settings.adapter_cost * share)
        self.counters[sequence.tenant] += cost / self.weight(sequence.tenant)

    # --- what follows ---

    def loaded_bytes(self, sequence: Sequence) -> int:
        return 0 if sequence.version_id in self.on_device else sequence.adapter_bytes

    def weight(self, tenant: str) -> float:
        return dict(self.settings.tenant_weights).get(tenant, 1.0)

    def urgency(self, sequence: Sequence) -> tuple[float, int]:
        if self.settings.queue_order == "fcfs":
            return (0.0, sequence.tag)
        waiting_since = sequence.arrival_s + sequence.priority * self.settings.priority_ageing_s
        return (waiting_since, sequence.tag)

    def best(self, sequences: list[Sequence]) -> Sequence | None:
        """Of these, whose turn it is."""
        if self.settings.queue_order != "vtc":
            return min(sequences, key=self.urgency, default=None)
        heads: dict[str, Sequence] = {}
        for sequence in sorted(sequences, key=self.urgency):
            heads.setdefault(sequence.tenant, sequence)
        levels = {tenant: self.level(self.counters[tenant]) for tenant in heads}
        return min(heads.values(), key=lambda s: (levels[s.tenant], s.tag), default=None)

    def level(self, counter: float) -> float:
        """Counters from a multiple of the tolerance to the next count as that multiple."""
        tolerance = self.settings.tenant_tolerance
        return counter - counter % tolerance if tolerance else counter

    def in_turn(self) -> Sequence | None:
        return self.best(self.new)

    def first(self) -> Sequence | None:
        if self.preempted:
            return self.preempted[0]
        head = self.in_turn()
        settings = self.settings
        running = {s.version_id for s in self.running} - {None}
        if (
            head is None
            or settings.cluster_adapters is None
            or len(running) < settings.cluster_adapters
        ):
            return head
        hot = [s for s in self.new if s.version_id is None or s.version_id in running]
        other = self.best(hot)
        if other is None:
            return head
        if self.overtakes - self.overtakes_at_arrival[head.tag] >= settings.cluster_max_overtakes:
            return head
        wait_s = settings.cluster_max_wait_s
        if wait_s is not None and self.now_s - head.arrival_s >= wait_s:
            return head
        lead = self.counters[other.tenant] - self.counters[head.tenant]
        if settings.queue_order == "vtc" and lead > settings.cluster_max_lead:
            return head
        return other

    def order(self) -> list[Sequence]:
        """All that wait, as they would be admitted were there room for all."""
        ahead, found = self.copy(), []
        while (sequence := ahead.first()) is not None:
            found.append(sequence)
            ahead.admit(sequence)
        return found
