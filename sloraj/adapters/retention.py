"""Which idle adapter versions are worth keeping: the policies that `Residency` asks.

`cost`   bytes to send again x how often it is used, for each page freed (the default)
`lru`    what was used last
`paper`  S-LoRA's: nothing stays that no running sequence uses, but what was sent ahead
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

from sloraj.adapters.host_store import AdapterVersion

KeepValue = tuple[float, ...]


class RetentionPolicy(Protocol):
    """Orders idle versions. Sees uses as they happen and values a version when it becomes idle."""

    keeps_idle: bool  # False: what no running sequence uses is freed at once
    heeds_queue: bool  # what waiting sequences want is kept before what they do not

    def record_use(self, version: AdapterVersion, now_s: float) -> None:
        """Note that a sequence took the version."""

    def keep_value(self, version: AdapterVersion) -> KeepValue:
        """Worth of keeping it, a page freed; the lowest goes first.

        The order of two idle versions must not change with time, so that it is computed once.
        """


@dataclasses.dataclass(slots=True)
class ExpectedReloadCost:
    """Cost of sending it again x rate of use / pages it frees; the least recently used on a tie.

    The cost of a reload is its bytes, and `fixed_bytes` for the work that every reload takes: so of
    two that are used alike the smaller stays, because the room of a large one keeps several.
    A use counts less by e after `decay_uses` uses of any adapter, and after `decay_s` seconds: a
    window that holds enough uses to tell rates apart under any load, and yet forgets what was
    popular another day. Two rates that decay alike keep their order, so the logarithm of the rate
    at the last use, plus that moment, orders them for good.

    Source: cost-aware eviction as in Chameleon (MICRO 2025) and FastLibra (arXiv:2505.03756); in
    the form of an expected cost a page instead of a weighted sum.
    """

    decay_uses: float = 1000.0
    decay_s: float = 3600.0
    fixed_bytes: int = 8 << 20
    keeps_idle: bool = dataclasses.field(default=True, init=False)
    heeds_queue: bool = dataclasses.field(default=True, init=False)
    _num_uses: int = dataclasses.field(default=0, init=False)

    def record_use(self, version: AdapterVersion, now_s: float) -> None:
        self._num_uses += 1
        moment = self._num_uses / self.decay_uses + now_s / self.decay_s
        version.use_weight = version.use_weight * math.exp(version.use_moment - moment) + 1.0
        version.use_moment = moment
        version.last_used_s = now_s

    def keep_value(self, version: AdapterVersion) -> KeepValue:
        cost_per_page = (version.packed.num_bytes + self.fixed_bytes) / max(version.num_pages, 1)
        rate = math.log(max(version.use_weight, 1e-30)) + version.use_moment
        return (math.log(max(cost_per_page, 1e-30)) + rate, version.last_used_s)


@dataclasses.dataclass(slots=True)
class LeastRecentlyUsed:
    keeps_idle: bool = dataclasses.field(default=True, init=False)
    heeds_queue: bool = dataclasses.field(default=False, init=False)
    _num_uses: int = dataclasses.field(default=0, init=False)

    def record_use(self, version: AdapterVersion, now_s: float) -> None:
        self._num_uses += 1
        version.use_moment, version.last_used_s = float(self._num_uses), now_s

    def keep_value(self, version: AdapterVersion) -> KeepValue:
        return (version.use_moment,)


@dataclasses.dataclass(slots=True)
class RunningBatchOnly(LeastRecentlyUsed):
    """S-LoRA, section 5: an adapter leaves with the last running request that uses it. Those sent
    ahead stay while a waiting request wants them and something runs.
    """

    keeps_idle: bool = dataclasses.field(default=False, init=False)


RETENTION_POLICIES: dict[str, type[ExpectedReloadCost] | type[LeastRecentlyUsed]] = {
    "cost": ExpectedReloadCost,
    "lru": LeastRecentlyUsed,
    "paper": RunningBatchOnly,
}
