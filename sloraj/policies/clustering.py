"""Adapter clustering: once `d` distinct adapters run, those that wait for one of them come first.

Fewer distinct adapters in a batch read fewer bytes a step, and fewer are loaded. The cap is soft:
what room is left goes to whose turn it is. Source: S-LoRA, section 4 (arXiv:2311.03285); the
bounds on overtaking are ours. The base model counts as an adapter that always runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sloraj.errors import InternalError
from sloraj.policies.ranking import Account, Item, Ranking
from sloraj.policies.settings import QueueConfig
from sloraj.policies.walk import Walk
from sloraj.request import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class _Waiting:
    account: Account
    score: float
    num_overtakes: int  # of all, when it came


class Clustering:
    """Which adapters run, and the waiting sequences of those."""

    def __init__(self, settings: QueueConfig, clock: Callable[[], float]) -> None:
        assert settings.cluster_adapters is not None
        self._settings = settings
        self._max_adapters = settings.cluster_adapters
        self._clock = clock
        self._num_running: dict[str, int] = {}
        self._waiting: dict[str | None, dict[Sequence, _Waiting]] = {}
        self._hot = Ranking()  # those whose adapter runs
        self.num_overtakes = 0  # admissions of another than whose turn it was
        self.num_held = 0  # admissions in turn because the bound said so
        self._is_held = False  # the last choice was such

    def is_running(self, version_id: str | None) -> bool:
        return version_id is None or version_id in self._num_running

    def add(self, account: Account, score: float, sequence: Sequence) -> None:
        waiting = self._waiting.setdefault(sequence.version_id, {})
        waiting[sequence] = _Waiting(account, score, self.num_overtakes)
        if self.is_running(sequence.version_id):
            self._hot.add(account, score, sequence)

    def remove(self, sequence: Sequence) -> None:
        waiting = self._waiting[sequence.version_id]
        gone = waiting.pop(sequence)
        if not waiting:
            del self._waiting[sequence.version_id]
        if self.is_running(sequence.version_id):
            self._hot.remove(gone.account, gone.score, sequence)

    def start(self, version_id: str | None) -> None:
        """One more sequence of the adapter runs."""
        if version_id is None:
            return
        self._num_running[version_id] = self._num_running.get(version_id, 0) + 1
        if self._num_running[version_id] == 1:
            for sequence, waiting in self._waiting.get(version_id, {}).items():
                self._hot.add(waiting.account, waiting.score, sequence)

    def stop(self, version_id: str | None) -> None:
        """One sequence fewer of the adapter runs."""
        if version_id is None:
            return
        self._num_running[version_id] -= 1
        if self._num_running[version_id] == 0:
            del self._num_running[version_id]
            for sequence, waiting in self._waiting.get(version_id, {}).items():
                self._hot.remove(waiting.account, waiting.score, sequence)

    def choose(self, head: Item) -> Sequence:
        """Who is admitted next, if it is `head`'s turn."""
        self._is_held = False
        if len(self._num_running) < self._max_adapters or self.is_running(head[2].version_id):
            return head[2]
        candidate = self._hot.first()
        if candidate is None:
            return head[2]
        counter = self._waiting_of(candidate[2]).account.counter
        lead = counter - self._waiting_of(head[2]).account.counter
        if self._may_overtake(head[2], self.num_overtakes, lead):
            return candidate[2]
        self._is_held = True
        return head[2]

    def admitted(self, sequence: Sequence, head: Item) -> None:
        """`choose` said `sequence`, and it runs. To be called before it is removed."""
        self.num_overtakes += sequence is not head[2]
        self.num_held += self._is_held and sequence is head[2]

    def _may_overtake(self, head: Sequence, num_overtakes: int, lead: float) -> bool:
        settings = self._settings
        since = num_overtakes - self._waiting_of(head).num_overtakes
        max_wait_s = settings.cluster_max_wait_s
        return (
            since < settings.cluster_max_overtakes
            and lead <= settings.cluster_max_lead
            and (max_wait_s is None or self._clock() - head.arrival_s < max_wait_s)
        )

    def _waiting_of(self, sequence: Sequence) -> _Waiting:
        return self._waiting[sequence.version_id][sequence]

    def check_integrity(self, ranking: Ranking) -> None:
        """Raise InternalError unless exactly those of `ranking` wait here, and those whose adapter
        runs are hot.
        """
        self._hot.check_integrity()
        ranked = {s for account in ranking.accounts for _, _, s in ranking.items_of(account)}
        waiting = {s for sequences in self._waiting.values() for s in sequences}
        hot = {s for account in self._hot.accounts for _, _, s in self._hot.items_of(account)}
        if ranked != waiting:
            raise InternalError("clustering: other sequences wait than are ranked")
        if hot != {s for s in waiting if self.is_running(s.version_id)}:
            raise InternalError("clustering: the hot sequences are not those whose adapter runs")


class ClusteringAhead:
    """What `Clustering` would choose, were all admitted that it chooses."""

    def __init__(
        self, clustering: Clustering, counters: dict[Account, float], taken: set[Sequence]
    ) -> None:
        self._clustering = clustering
        self._counters = counters
        self._walk = Walk(clustering._hot, counters, taken)
        self._started: set[str] = set()
        self._num_overtakes = clustering.num_overtakes

    def choose(self, head: Item) -> Sequence:
        """Who would be admitted next, and is from here on."""
        sequence = self._overtaking(head[2])
        if sequence is None:
            self.start(head[2].version_id)
            return head[2]
        self._num_overtakes += 1
        return sequence

    def _overtaking(self, head: Sequence) -> Sequence | None:
        now = self._clustering
        num_running = len(now._num_running) + len(self._started)
        if num_running < now._max_adapters or self._is_running(head.version_id):
            return None
        candidate = self._walk.peek()
        if candidate is None:
            return None
        lead = self._counter_of(candidate[2]) - self._counter_of(head)
        may_overtake = now._may_overtake(head, self._num_overtakes, lead)
        return candidate[2] if may_overtake else None

    def _is_running(self, version_id: str | None) -> bool:
        return self._clustering.is_running(version_id) or version_id in self._started

    def _counter_of(self, sequence: Sequence) -> float:
        account = self._clustering._waiting_of(sequence).account
        return self._counters.get(account, account.counter)

    def start(self, version_id: str | None) -> None:
        """One more sequence of the adapter would run."""
        if version_id is None or self._is_running(version_id):
            return
        self._started.add(version_id)
        items: dict[Account, list[Item]] = {}
        for sequence, waiting in self._clustering._waiting.get(version_id, {}).items():
            item = (waiting.score, sequence.tag, sequence)
            items.setdefault(waiting.account, []).append(item)
        for account, added in items.items():
            self._walk.add(account, added)
