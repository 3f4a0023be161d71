"""Which waiting sequences to give up because their first token would come too late.

`PaperAbort` is S-LoRA's rule (section 4.3 of arXiv:2311.03285, as its code has it); `ModelAbort`
asks a forecast, and drops what is late; `LargestAbort` asks the same, and drops what makes others
late. None touches a sequence that runs, or whose request has had a token: its `deadline_s` is
infinite.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sloraj.policies.order import FirstComeFirstServed
from sloraj.policies.outlook import Outlook
from sloraj.request import Sequence, SequenceState

LENIENCE = 0.2  # of a predicted wait, in favour of the sequence: it may turn out shorter by that
# Of an objective: a first token still has to be told, over a connection, when the engine has it.
HEADROOM, HEADROOM_S = 0.02, 0.01
PAPER_HEADROOM_S = 0.5  # the paper's: what has waited to within this of its objective is dropped
PAPER_KEPT = 0.3  # of an estimate, at each new value


class TooLate(NamedTuple):
    """A sequence to drop."""

    sequence: Sequence
    first_token_s: float  # predicted, on the engine's clock
    retry_after_s: float  # until those that wait before it will have been served


class ModelAbort:
    """Drops a sequence as soon as its predicted first token is beyond its deadline, in the order of
    the queue: so those that are served are those that still can make it.

    A sequence that could make it were the late ones before it gone is kept. With `n` choices all
    of them must be late, since the first one to speak answers for the request.
    """

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap

    def add(self, sequence: Sequence) -> None:
        """A new one waits."""
        if sequence.deadline_s < math.inf:
            heapq.heappush(self._deadlines, (sequence.deadline_s, sequence.tag, sequence))

    def too_late(self, now_s: float) -> list[TooLate]:
        """Those to drop before a step. They still wait; the caller aborts them."""
        late = {s.tag: found for found in self._predicted(now_s) for s in [found.sequence]}
        while self._deadlines and self._deadlines[0][0] <= now_s:
            sequence = heapq.heappop(self._deadlines)[2]
            is_waiting = sequence.state is SequenceState.WAITING and not sequence.num_in_flight
            if is_waiting and sequence.deadline_s <= now_s and sequence.tag not in late:
                late[sequence.tag] = TooLate(sequence, now_s, self._drain_s(now_s))
        return _whole_requests(list(late.values()))

    def _drain_s(self, now_s: float) -> float:
        first_token_s = self._outlook.forecast.first_token_s
        since_s = now_s - self._outlook.looked_s
        return max(float(first_token_s[-1]) - since_s, 0.0) if len(first_token_s) else 0.0

    def _predicted(self, now_s: float) -> list[TooLate]:
        """Those of the forecast of this step; none if the last one is older."""
        outlook = self._outlook
        if not outlook.is_fresh or not outlook.sequences:
            return []
        forecast, sequences = outlook.forecast, outlook.sequences
        deadlines = np.array([s.deadline_s for s in sequences])
        arrivals = np.array([s.arrival_s for s in sequences])
        headroom = HEADROOM_S + HEADROOM * (deadlines - arrivals)
        latest = np.where(deadlines < math.inf, deadlines, 0) - headroom
        latest_s = np.where(deadlines < math.inf, latest, math.inf)
        suspects = np.nonzero(now_s + (1 - LENIENCE) * forecast.first_token_s > latest_s)[0]
        if not len(suspects):
            return []
        return self._to_drop(now_s, int(suspects[0]), latest_s.tolist())

    def _to_drop(self, now_s: float, start: int, latest_s: list[float]) -> list[TooLate]:
        """Of the forecast sequences, of which `start` is the first that may be late; `latest_s`:
        when each must have its first token.
        """
        outlook = self._outlook
        forecast, sequences = outlook.forecast, outlook.sequences
        found: list[TooLate] = []
        first_token_s, own_s = forecast.first_token_s.tolist(), forecast.own_s.tolist()
        gained_s, alone_s = 0.0, outlook.pace.busy_s + outlook.pace.decode_step_s
        last_s = first_token_s[start - 1] if start else 0.0
        for place in range(start, len(sequences)):
            # Whoever comes behind k dropped ones moves up: at the best to where the k-th before it
            # was, and to what its own prompt takes.
            moved_s = min(first_token_s[place] - gained_s, first_token_s[place - len(found)])
            moved_s = max(moved_s, alone_s + own_s[place])
            sequence = sequences[place]
            soonest_s = now_s + (1 - LENIENCE) * moved_s
            if soonest_s > latest_s[place] and not sequence.num_in_flight:
                found.append(TooLate(sequence, now_s + moved_s, 0.0))
                gained_s += own_s[place]
            else:
                last_s = moved_s
        return [late._replace(retry_after_s=last_s) for late in found]


class LargestAbort(ModelAbort):
    """As `ModelAbort`, but when one would be late, the one goes, of those up to it, that would hold
    most memory for longest; what comes behind moves up by its share. So the fewest are refused.

    Source: Moore, "An n job, one machine sequencing algorithm for minimizing the number of late
    jobs" (1968), which is optimal for one machine, known durations and deadlines in order.
    """

    def _to_drop(self, now_s: float, start: int, latest_s: list[float]) -> list[TooLate]:
        outlook = self._outlook
        sequences = outlook.sequences
        first_token_s, own_s = (
            values.tolist() for values in (outlook.forecast.first_token_s, outlook.forecast.own_s)
        )
        footprints = [self._footprint(sequence) for sequence in sequences]
        place_s = (first_token_s[-1] - first_token_s[0]) / max(len(sequences) - 1, 1)
        footprint_s = place_s * len(sequences) / sum(footprints)
        alone_s = outlook.pace.busy_s + outlook.pace.decode_step_s
        gained_s, last_s = 0.0, 0.0
        largest: list[tuple[float, int]] = []  # a heap of those that may go, up to this place
        found: list[TooLate] = []
        for place, sequence in enumerate(sequences):
            can_go = not sequence.num_in_flight and sequence.deadline_s < math.inf
            if can_go and sequence.params.n == 1:  # several choices only go together
                heapq.heappush(largest, (-footprints[place], place))
            gone = -1
            while True:
                moved_s = max(first_token_s[place] - gained_s, alone_s + own_s[place])
                if now_s + (1 - LENIENCE) * moved_s <= latest_s[place]:
                    break
                is_another = bool(largest) and -largest[0][0] >= footprints[place]
                gone = heapq.heappop(largest)[1] if is_another else place
                if gone != place or can_go:
                    found.append(TooLate(sequences[gone], now_s + moved_s, 0.0))
                    gained_s += footprint_s * footprints[gone]
                if gone == place:
                    break
            if gone != place:
                last_s = moved_s
        return [late._replace(retry_after_s=last_s) for late in found]

    def _footprint(self, sequence: Sequence) -> float:
        """Pages that it will hold, times the steps for which it will."""
        outputs = sequence.max_output_tokens - len(sequence.output_token_ids)
        return (sequence.num_tokens + outputs / 2) / self._outlook.pace.page_size * max(outputs, 1)


def _whole_requests(late: list[TooLate]) -> list[TooLate]:
    """Those of which every choice is late."""
    counts: dict[str, int] = {}
    for found in late:
        counts[found.sequence.request_id] = counts.get(found.sequence.request_id, 0) + 1
    return [f for f in late if counts[f.sequence.request_id] >= f.sequence.params.n]


class PaperAbort(FirstComeFirstServed):
    """S-LoRA's: an order of the queue that is newest first while requests come faster than they
    are admitted, else oldest first, and that drops what has nearly waited for its objective.

    Nothing is predicted. The original attempts to admit now and then; here every step is an
    attempt.
    """

    def __init__(self) -> None:
        super().__init__()
        self._by_tag: dict[int, Sequence] = {}  # oldest first
        self.rate = 1  # sequences that came since the last admission, smoothed
        self.batch_size = 1  # sequences admitted at a time, smoothed
        self._num_left = 0  # in the queue after the last admission
        self._num_admitted = 0  # in this attempt
        self._num_newest_first = 0  # attempts

    def too_late(self, now_s: float) -> list[TooLate]:
        """Those to drop before a step. They still wait; the caller aborts them."""
        if self._num_admitted:
            smoothed = int((1 - PAPER_KEPT) * self._num_admitted + PAPER_KEPT * self.batch_size)
            self.batch_size = max(smoothed, 1)
            self._num_admitted = 0
        growth = len(self._by_tag) - self._num_left
        self.rate = int((1 - PAPER_KEPT) * growth + PAPER_KEPT * self.rate)
        self._num_newest_first += self.is_newest_first
        late = [
            TooLate(sequence, max(sequence.deadline_s, now_s), 0.0)
            for sequence in self._by_tag.values()
            if now_s + PAPER_HEADROOM_S >= sequence.deadline_s
        ]
        return _whole_requests(late)

    @property
    def is_newest_first(self) -> bool:
        return self.rate >= self.batch_size

    def __len__(self) -> int:
        return len(self._by_tag)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_tag.values())

    def add(self, sequence: Sequence) -> None:
        self._by_tag[sequence.tag] = sequence

    def remove(self, sequence: Sequence) -> None:
        del self._by_tag[sequence.tag]

    def first(self, *, is_tight: bool = False) -> Sequence | None:
        return next(self.in_order(()), None)

    def in_order(
        self, resumed: Iterable[Sequence], *, is_tight: bool = False
    ) -> Iterator[Sequence]:
        values = self._by_tag.values()
        return iter(reversed(values)) if self.is_newest_first else iter(values)

    def admit(self, sequence: Sequence, loaded_bytes: int) -> None:
        del self._by_tag[sequence.tag]
        self._num_admitted += 1
        self._num_left = len(self._by_tag)

    def stats(self) -> dict[str, Any]:
        return {
            "rate": self.rate,
            "batch_size": self.batch_size,
            "newest_first": self._num_newest_first,
        }
