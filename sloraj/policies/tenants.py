"""Accounts of tenants: who has been served how much, and who may be forgotten.

Source: Virtual Token Counter (VTC), arXiv:2401.00588, algorithms 1 and 2. A tenant that comes back
to the queue starts no lower than the `floor`, so that no service is saved up while idle.
"""

from __future__ import annotations

from collections import OrderedDict

from sloraj.errors import InternalError
from sloraj.policies.ranking import Account, Ranking

MAX_IDLE_TENANTS = 65_536  # remembered without any request, because they are above the floor
AHEAD = 1.5  # times an equal part of what runs, above which a tenant runs too many


class Tenants:
    """Accounts by name. `ranking` holds the waiting sequences, under the accounts made here."""

    def __init__(
        self, weights: tuple[tuple[str, float], ...], ranking: Ranking, tolerance: float = 0.0
    ) -> None:
        self._weights, self._tolerance = dict(weights), tolerance
        self._ranking = ranking
        self._accounts: dict[str, Account] = {}
        self._idle: OrderedDict[Account, None] = OrderedDict()  # idle longest first
        self._last: Account | None = None  # that left the queue empty
        self._floor = 0.0
        self._num_admitted = 0  # sequences, and not finished
        self._num_active = 0  # tenants that have any
        self.num_forgotten = 0  # above the floor

    def __len__(self) -> int:
        return len(self._accounts)

    def floor(self) -> float:
        """The least level of those that wait; without any, that of the last that waited.

        It never falls: counters only rise, and nobody comes in below it.
        """
        account = self._ranking.first_account() or self._last
        if account is not None:
            self._floor = max(self._floor, account.level)
        return self._floor

    def arrive(self, tenant: str) -> Account:
        """The account under which a new sequence waits; to be called before it is ranked."""
        account = self._accounts.get(tenant)
        if account is None:
            account = Account(tenant, self._weights.get(tenant, 1.0), self._tolerance)
            self._accounts[tenant] = account
        self._idle.pop(account, None)
        if account.num_waiting == 0:
            account.counter = max(account.counter, self.floor())
        account.num_waiting += 1
        return account

    def leave(self, account: Account, *, is_admitted: bool) -> None:
        """A sequence waits no more; to be called after it has left the ranking."""
        account.num_waiting -= 1
        if is_admitted:
            self._num_active += account.num_admitted == 0
            self._num_admitted += 1
            account.num_admitted += 1
        if self._ranking.first_account() is None:
            self._last = account
        self._settle(account)

    def finish(self, account: Account) -> None:
        account.num_admitted -= 1
        self._num_admitted -= 1
        self._num_active -= account.num_admitted == 0
        self._settle(account)

    def is_ahead(self, account: Account) -> bool:
        """Whether it runs many more sequences than an equal part; a tenant alone never does."""
        return account.num_admitted * self._num_active > AHEAD * self._num_admitted

    def _settle(self, account: Account) -> None:
        """Forget idle accounts that are at or below the floor, where they would be put anyway, and
        those idle longest of too many.
        """
        if account.num_waiting or account.num_admitted:
            return
        self._idle[account] = None
        floor = self.floor()
        while self._idle:
            oldest = next(iter(self._idle))
            if oldest.counter > floor:
                if len(self._idle) <= MAX_IDLE_TENANTS:
                    return
                self.num_forgotten += 1
            del self._idle[oldest]
            del self._accounts[oldest.tenant]

    def num_waiting_of(self, tenant: str) -> int:
        account = self._accounts.get(tenant)
        return 0 if account is None else account.num_waiting

    @property
    def num_waiting(self) -> int:
        return len(self._ranking.accounts)

    def spread(self) -> float:
        """Between the counters of those that wait: what fairness bounds."""
        counters = [account.counter for account in self._ranking.accounts]
        return max(counters) - min(counters) if counters else 0.0

    def check_integrity(self) -> None:
        """Raise InternalError unless accounts, queue and idle ones agree, and none waits below the
        floor.
        """
        floor = self.floor()
        for tenant, account in self._accounts.items():
            num_waiting = len(self._ranking.items_of(account))
            if tenant != account.tenant or num_waiting != account.num_waiting:
                raise InternalError(
                    f"tenant {tenant!r}: {num_waiting} wait, {account.num_waiting} counted"
                )
            if num_waiting and account.counter < floor:
                raise InternalError(f"tenant {tenant!r} waits below the floor")
            is_idle = account.num_waiting == account.num_admitted == 0
            if is_idle != (account in self._idle):
                raise InternalError(f"tenant {tenant!r}: idle is {is_idle}, and kept otherwise")
        running = [a.num_admitted for a in self._accounts.values() if a.num_admitted]
        if (sum(running), len(running)) != (self._num_admitted, self._num_active):
            raise InternalError(
                f"{self._num_admitted} of {self._num_active} tenants run: {running}"
            )
        if len(self._idle) > MAX_IDLE_TENANTS:
            raise InternalError(f"{len(self._idle)} idle tenants are remembered")
        if any(self._accounts.get(a.tenant) is not a for a in self._ranking.accounts):
            raise InternalError("a waiting tenant was forgotten")
