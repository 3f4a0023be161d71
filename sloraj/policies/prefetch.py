"""Which adapters of waiting sequences to send ahead of their admission.

Their bytes cross the bus beside a step's computation. What is sent ahead is idle until it is used,
so it never takes a page from a running sequence or an admission: those evict it. To be of use it
must not come to that, so it only takes pages that nobody will want before its own turn.
"""

from __future__ import annotations

from collections.abc import Callable

from sloraj.adapters.host_store import AdapterVersion
from sloraj.adapters.residency import Residency
from sloraj.config import SchedulerConfig, div_ceil
from sloraj.policies.outlook import Outlook
from sloraj.request import Sequence
from sloraj.step_plan import Plan

MAX_SEQUENCES = 64  # whose turn comes first, whose adapters are sent


class Prefetch:
    """Fills `Plan.sends`, in the order of the queue."""

    def __init__(
        self,
        config: SchedulerConfig,
        residency: Residency,
        version_of: Callable[[Sequence], AdapterVersion | None],
        outlook: Outlook,
    ) -> None:
        self._config = config
        self._residency = residency
        self._version_of = version_of
        self._outlook = outlook

    def wants(self, window: list[Sequence]) -> bool:
        """Whether the adapter of any of these is not on the device and might get a slot there."""
        if not self._residency.has_slot:
            return False
        is_resident = self._residency.is_resident
        return any([s.version_id is not None and not is_resident(s.version_id) for s in window])

    def plan(self, plan: Plan, window: list[Sequence], num_running: int) -> None:
        """Send what the step's bound on installs leaves room for, the first whatever its size, for
        the waiting sequences of `window`, in their order.

        A forecast that is a little old errs to the safe side: each turn is thought to be later.
        """
        trough, net = self._outlook.forecast.trough_pages, self._outlook.forecast.net_pages
        awaited: set[str] = set()  # by those whose turn is before
        num_ahead_pages = 0  # that their prompts will take
        for place, sequence in enumerate(window):
            version = self._version_of(sequence)
            if version is not None and version.version_id not in awaited:
                if not self._residency.is_resident(version.version_id):
                    total = plan.num_install_pages + version.num_pages
                    if plan.num_install_pages and total > self._config.install_pages_per_step:
                        return
                    wanted = float(num_running + num_ahead_pages)
                    if len(net):
                        place = min(place, len(net) - 1)
                        wanted = max(trough[place], net[place] + num_ahead_pages, num_running)
                    install = self._residency.prefetch(version, int(wanted), awaited)
                    if install is None:
                        return
                    plan.sends.append(install)
                    plan.num_install_pages = total
                awaited.add(version.version_id)
            num_ahead_pages += div_ceil(sequence.num_tokens, self._config.page_size) + 1
