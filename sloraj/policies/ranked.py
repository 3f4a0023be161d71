"""The orders that look at more than arrival: priority, fair between tenants, and clustering.

priority   the lower value first; waiting `priority_ageing_s` counts as one level, so the order of
           two sequences never changes, and nobody waits for ever.
vtc        the tenant that was served least first (`tenants.py`); among its own, as by priority;
           with a tolerance, first come first served among tenants that were served about alike.
clustering on top of any order, first come first served included (`clustering.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sloraj.errors import InternalError
from sloraj.policies.clustering import Clustering, ClusteringAhead
from sloraj.policies.cost import ServiceCost
from sloraj.policies.ranking import Account, Ranking
from sloraj.policies.settings import QueueConfig
from sloraj.policies.tenants import Tenants
from sloraj.policies.walk import Walk
from sloraj.request import Sequence

AFTER_ALL = 1e15  # cost: more than any tenant is charged
LoadedBytes = Callable[[Sequence], int]
_Arrival = tuple[Account, float, float]  # score; cost of the prompt over the account's weight


class RankedOrder:
    """Implements `Order`. `loaded_bytes` says what a sequence would bring to the device, if it were
    admitted now.
    """

    def __init__(
        self,
        settings: QueueConfig,
        cost: ServiceCost,
        clock: Callable[[], float],
        loaded_bytes: LoadedBytes,
    ) -> None:
        self._settings = settings
        self._cost = cost
        self._loaded_bytes = loaded_bytes
        self._ranking = Ranking()
        self._arrivals: OrderedDict[Sequence, _Arrival] = OrderedDict()
        self._everyone = Account("")  # without tenants
        is_fair = settings.queue_order == "vtc"
        tenants = Tenants(settings.tenant_weights, self._ranking, settings.tenant_tolerance)
        self._tenants = tenants if is_fair else None
        self._admitted: dict[Sequence, tuple[Account, float]] = {}  # and what a token costs it
        is_clustered = settings.cluster_adapters is not None
        self._clustering = Clustering(settings, clock) if is_clustered else None
        self._is_in_turn = False  # the rest of this pass takes nobody out of turn
        self._is_out_of_turn = False  # what `first` said last
        self._num_overtakes = 0

    def __len__(self) -> int:
        return len(self._arrivals)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._arrivals)

    # --- who waits ---

    def add(self, sequence: Sequence) -> None:
        tenants = self._tenants
        account = self._everyone if tenants is None else tenants.arrive(sequence.tenant)
        score = self._score(sequence)
        prompt_cost = self._cost.prompt(sequence.num_prompt_tokens, sequence.adapter_bytes)
        self._arrivals[sequence] = (account, score, prompt_cost / account.weight)
        self._ranking.add(account, score, sequence)
        if self._clustering is not None:
            self._clustering.add(account, score, sequence)

    def remove(self, sequence: Sequence) -> None:
        self._leave(sequence, is_admitted=False)

    def _leave(self, sequence: Sequence, *, is_admitted: bool) -> None:
        account, score, _ = self._arrivals.pop(sequence)
        self._ranking.remove(account, score, sequence)
        if self._clustering is not None:
            self._clustering.remove(sequence)
        if self._tenants is not None:
            self._tenants.leave(account, is_admitted=is_admitted)

    def _score(self, sequence: Sequence) -> float:
        """Within an account, the lower first; equal ones in the order of arrival."""
        if self._settings.queue_order == "fcfs":
            return 0.0
        return sequence.arrival_s + sequence.priority * self._settings.priority_ageing_s

    # --- whose turn it is ---

    def start_pass(self) -> None:
        self._is_in_turn = False

    def first(self, *, is_tight: bool = False) -> Sequence | None:
        head = self._ranking.first()
        self._is_out_of_turn = False
        if head is None:
            return None
        if is_tight and self._tenants is not None:
            return self._first_behind(self._tenants)
        if self._clustering is None or self._is_in_turn:
            return head[2]
        sequence = self._clustering.choose(head)
        self._is_out_of_turn = sequence is not head[2]
        return sequence

    def _first_behind(self, tenants: Tenants) -> Sequence | None:
        """The first of a tenant that does not run too many already, unless whose turn it is has
        been served less by more than the lead that any preference may give.
        """
        entry = self._ranking.start_walk()
        head = None if entry is None else entry[3]
        while entry is not None and tenants.is_ahead(entry[3].account):
            entry = self._ranking.next_entry()
        if entry is None or head is None:
            return None
        lead = entry[3].account.counter - head.account.counter
        line = head if lead > self._settings.cluster_max_lead else entry[3]
        return line.items[0][2]

    def pass_over(self) -> bool:
        # What is clustered and does not fit leaves the rest of the pass to whose turn it is.
        self._is_in_turn = self._is_out_of_turn
        return self._is_out_of_turn

    def in_order(
        self, resumed: Iterable[Sequence], *, is_tight: bool = False
    ) -> Iterator[Sequence]:
        counters: dict[Account, float] = {}
        taken: set[Sequence] = set()
        loaded = {sequence.version_id for sequence in resumed}
        keeps_room = is_tight and self._keeps_room()  # before the walk: it walks, too
        walk = Walk(self._ranking, counters, taken)
        passed_over: set[Account] = set()
        ahead = None
        if self._clustering is not None and not keeps_room:
            ahead = ClusteringAhead(self._clustering, counters, taken)
            for version_id in loaded:
                ahead.start(version_id)
        while (head := walk.peek()) is not None:
            if keeps_room and self._passes_over(head[2], counters, passed_over):
                continue
            sequence = head[2] if ahead is None else ahead.choose(head)
            taken.add(sequence)
            if self._tenants is not None:
                account, _, charge = self._arrivals[sequence]
                if sequence.version_id not in loaded:
                    loaded.add(sequence.version_id)
                    charge += self._load_cost(account, self._loaded_bytes(sequence))
                counters[account] = counters.get(account, account.counter) + charge
            yield sequence

    def _keeps_room(self) -> bool:
        """Whether who runs too many is passed over for somebody who waits."""
        if self._tenants is None:
            return False
        first = self._first_behind(self._tenants)
        return first is None or not self._tenants.is_ahead(self._arrivals[first][0])

    def _passes_over(
        self, sequence: Sequence, counters: dict[Account, float], passed_over: set[Account]
    ) -> bool:
        """Whether its tenant runs too many, as things are; then it comes after all others."""
        assert self._tenants is not None
        account = self._arrivals[sequence][0]
        if account in passed_over or not self._tenants.is_ahead(account):
            return False
        passed_over.add(account)
        counters[account] = counters.get(account, account.counter) + AFTER_ALL
        return True

    # --- who is served ---

    def admit(self, sequence: Sequence, loaded_bytes: int) -> None:
        head = self._ranking.first()
        assert head is not None
        self._num_overtakes += sequence is not next(iter(self._arrivals))
        if self._clustering is not None:
            self._clustering.admitted(sequence, head)
            self._clustering.start(sequence.version_id)
        account, _, charge = self._arrivals[sequence]
        self._leave(sequence, is_admitted=True)
        if self._tenants is not None:
            account.counter += charge + self._load_cost(account, loaded_bytes)
            token_cost = self._cost.output_token(sequence.adapter_bytes) / account.weight
            self._admitted[sequence] = (account, token_cost)

    def _load_cost(self, account: Account, num_bytes: int) -> float:
        return self._cost.load(num_bytes) / account.weight if num_bytes else 0.0

    def sampled(self, sequences: Iterable[Sequence]) -> None:
        if self._tenants is not None:
            admitted = self._admitted
            for sequence in sequences:
                account, token_cost = admitted[sequence]
                account.counter += token_cost

    def pause(self, sequence: Sequence) -> None:
        if self._clustering is not None:
            self._clustering.stop(sequence.version_id)

    def resume(self, sequence: Sequence) -> None:
        if self._clustering is not None:
            self._clustering.start(sequence.version_id)

    def finish(self, sequence: Sequence, *, was_running: bool) -> None:
        if self._clustering is not None and was_running:
            self._clustering.stop(sequence.version_id)
        if self._tenants is not None:
            account, _ = self._admitted.pop(sequence)
            self._tenants.finish(account)

    # --- what it comes to ---

    def num_waiting_of(self, tenant: str) -> int:
        return 0 if self._tenants is None else self._tenants.num_waiting_of(tenant)

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = {"overtakes": self._num_overtakes}
        if self._clustering is not None:
            stats["clustered_admissions"] = self._clustering.num_overtakes
            stats["wait_bound_admissions"] = self._clustering.num_held
        if self._tenants is not None:
            stats["tenants"] = len(self._tenants)
            stats["tenants_waiting"] = self._tenants.num_waiting
            stats["tenants_forgotten"] = self._tenants.num_forgotten
            stats["counter_spread"] = self._tenants.spread()
        return stats

    def check_integrity(self) -> None:
        self._ranking.check_integrity()
        ranked = [s for a in self._ranking.accounts for _, _, s in self._ranking.items_of(a)]
        if len(ranked) != len(self._arrivals) or set(ranked) != set(self._arrivals):
            raise InternalError("the ranked sequences are not those that wait")
        if self._tenants is not None:
            self._tenants.check_integrity()
        if self._clustering is not None:
            self._clustering.check_integrity(self._ranking)
