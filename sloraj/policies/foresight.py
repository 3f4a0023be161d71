"""The policies that look ahead, for the scheduler: the outlook, early abort and prefetch."""

from __future__ import annotations

from collections.abc import Callable

from sloraj.adapters.host_store import AdapterVersion
from sloraj.adapters.residency import Residency
from sloraj.config import SchedulerConfig
from sloraj.policies import prefetch
from sloraj.policies.early_abort import LargestAbort, ModelAbort, PaperAbort, TooLate
from sloraj.policies.order import Order
from sloraj.policies.outlook import Outlook
from sloraj.policies.prefetch import Prefetch
from sloraj.policies.sparingly import Sparingly
from sloraj.policies.waiting import WaitingQueue
from sloraj.request import Sequence, SequenceState
from sloraj.step_plan import Plan
from sloraj.step_time import StepTimes

# That early abort looks at, those whose turn comes first. Walking the other orders is slower.
MAX_SEQUENCES, MAX_RANKED_SEQUENCES = 512, 128
MAX_WALK_SHARE = 0.002  # of the time, for walking the queue in order


class Foresight:
    """Owned by the scheduler. Each part can be turned off in the configuration."""

    def __init__(
        self,
        config: SchedulerConfig,
        clock: Callable[[], float],
        step_times: StepTimes,
        residency: Residency,
        version_of: Callable[[Sequence], AdapterVersion | None],
    ) -> None:
        self._clock = clock
        is_plain = config.queue.queue_order == "fcfs" and config.queue.cluster_adapters is None
        self._max_sequences = MAX_SEQUENCES if is_plain else MAX_RANKED_SEQUENCES
        self._outlook = Outlook(config, clock, step_times, residency)
        self._abort: ModelAbort | PaperAbort | None = None
        self.order: Order | None = None  # of the queue, where early abort decides that too
        if config.early_abort == "model":
            self._abort = ModelAbort(self._outlook)
        elif config.early_abort == "largest":
            self._abort = LargestAbort(self._outlook)
        elif config.early_abort == "paper":
            self._abort = self.order = PaperAbort()
        self._sparingly = Sparingly(clock, MAX_WALK_SHARE)
        self._window: list[Sequence] = []  # those whose turn came first when it was last looked
        self._prefetch: Prefetch | None = None
        if config.prefetch:
            self._prefetch = Prefetch(config, residency, version_of, self._outlook)

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        if isinstance(self._abort, ModelAbort):
            self._abort.add(sequence)

    def end(self, sequence: Sequence) -> None:
        """A running sequence has ended."""
        self._outlook.lengths.end(sequence)

    def too_late(
        self, waiting: WaitingQueue, running: list[Sequence], num_rows: int
    ) -> list[TooLate]:
        """The waiting sequences to abort before a step."""
        if isinstance(self._abort, ModelAbort):
            # Whatever is tight now: else who is passed over looks late, and others pay for it.
            self._outlook.look(waiting.in_order(self._max_sequences), running, num_rows)
        if self._abort is None:
            return []
        return self._abort.too_late(self._clock())

    def may_send(self, waiting: WaitingQueue) -> bool:
        """Whether a step might send something, were it only later."""
        if self._prefetch is None:
            return False
        return self._prefetch.wants(list(waiting.in_order(prefetch.MAX_SEQUENCES)))

    def plan_sends(
        self,
        plan: Plan,
        waiting: WaitingQueue,
        running: list[Sequence],
        num_rows: int,
        *,
        is_tight: bool,
    ) -> None:
        """Add to a plan the adapters that are worth sending ahead."""
        if self._prefetch is None or not waiting:
            return
        if self._sparingly.begin():  # walking some orders is slow
            in_order = waiting.in_order(prefetch.MAX_SEQUENCES, is_tight=is_tight)
            self._window = list(in_order)
            self._sparingly.end()
        window = [s for s in self._window if s.state is SequenceState.WAITING]
        if self._prefetch.wants(window):
            if not isinstance(self._abort, ModelAbort):  # else it was looked before the step
                self._outlook.look(window, running, num_rows)
            self._prefetch.plan(plan, window, len(running))
