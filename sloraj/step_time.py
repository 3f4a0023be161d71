"""How long a step takes, learnt from the engine's own steps: features of a batch -> seconds.

    features = features_of(batch, adapter_bytes, token_buckets)
    model.predict(features)             # seconds, above 0
    model.observe(features, seconds)    # one measured step

The prediction is a sum of costs, none below 0, so more work never takes less time. Costs are fitted
online by least squares over relative errors: an outlier (a pause of the collector, a page fault)
counts by its side and not by its size, and the memory is finite, so a device that slows down is
followed. Numpy on the host; deterministic; O(1) memory and time a step.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sloraj.batch import ScheduledBatch
from sloraj.token_budget import WEIGHT_BOUND_TOKENS


class StepFeatures(NamedTuple):
    """What is in a step, as far as it takes time. Counts, and bytes where the name says so."""

    num_decode_rows: int  # rows of one token
    context_tokens: int  # whose keys and values those rows read
    num_prefill_tokens: int  # of a mixed step: all its tokens, as padded to its bucket; else 0
    num_bound_tokens: int  # of them, those beyond what reading the weights hides
    prefill_pairs: int  # (token, earlier token) pairs that attention of longer rows computes
    adapter_bytes: int  # of the distinct adapters in the step
    num_installs: int
    install_bytes: int  # that this step waits for: not sent by the one before
    send_bytes: int  # that cross the bus beside this step

    @property
    def is_decode(self) -> bool:
        return self.num_prefill_tokens == 0


# Seconds for one of each, after the constant: a 7B model in bfloat16 on an H200. Where the engine
# runs elsewhere the first steps scale them all, and the fit does the rest.
PRIOR_CONSTANT_S = 4.3e-3
PRIOR_S = StepFeatures(5e-6, 1.4e-7, 1e-6, 2e-5, 3e-10, 3e-13, 5e-5, 4e-11, 1e-12)  # type: ignore[arg-type]

NOTHING = StepFeatures(0, 0, 0, 0, 0, 0, 0, 0, 0)

# Of steps that only decode, and of others, once `NUM_EAGER` steps are learnt.
LEARN_DECODE_EVERY, LEARN_MIXED_EVERY = 32, 8
NUM_EAGER = 100
NUM_FIRST = 9  # steps whose median scales the priors before anything is fitted
PRIOR_SD = 3.0  # of a cost, in units of its prior
NOISE = 0.05  # of a measured step, relative
FORGETTING = 0.005  # of what is known of a kind of step, at each such step
SPREAD_RATE = 0.05  # how fast the running spread of relative errors moves
MIN_SPREAD, MAX_SPREAD = 0.005, 1.0
HUBER = 2.0  # errors beyond this many spreads lose weight
MIN_PREDICTION_S = 1e-6


def features_of(
    batch: ScheduledBatch,
    adapter_bytes: Callable[[int], int],
    token_buckets: Sequence[int],
    *,
    num_sent: int = 0,
) -> StepFeatures:
    """Features of a step. `adapter_bytes(slot)` is the size of the adapter in a slot, 0 in slot 0;
    `token_buckets` are the sizes that mixed steps are padded to, ascending (none: no padding);
    `num_sent` of the step's installs, the first ones, were sent by the step before.
    """
    rows = batch.rows
    num_single = bisect.bisect_left(rows, 2, key=lambda row: row.num_tokens)
    chunks = rows[num_single:]
    context = sum([row.start for row in rows[:num_single]]) + num_single
    num_prefill = pairs = 0
    for row in chunks:
        num_prefill += row.num_tokens
        pairs += row.num_tokens * (2 * row.start + row.num_tokens) // 2
    if chunks:
        num_prefill += num_single
        place = bisect.bisect_left(token_buckets, num_prefill)
        num_prefill = token_buckets[place] if place < len(token_buckets) else num_prefill
    return StepFeatures(
        num_decode_rows=num_single,
        context_tokens=context,
        num_prefill_tokens=num_prefill,
        num_bound_tokens=max(num_prefill - WEIGHT_BOUND_TOKENS, 0),
        prefill_pairs=pairs,
        adapter_bytes=sum(map(adapter_bytes, {row.slot for row in rows})),
        num_installs=len(batch.installs),
        install_bytes=sum([i.packed.num_bytes for i in batch.installs[num_sent:]]),
        send_bytes=sum([send.packed.num_bytes for send in batch.sends]),
    )


class StepTimeModel:
    """Predicts the seconds of a step, and learns from those measured."""

    def __init__(self) -> None:
        # Everything is in units of the priors: costs start at 1.
        self._units = np.array([PRIOR_CONSTANT_S, *PRIOR_S])
        self._costs = np.ones(len(self._units))
        self._start()
        self._spread = 0.3  # running median of absolute relative errors
        self._first: list[tuple[np.ndarray, float]] = []
        self.num_observed = 0
        self.mean_step_s = PRIOR_CONSTANT_S  # of measured steps, the last ones counting most

    @property
    def spread(self) -> float:
        """The median relative error of late."""
        return self._spread

    @property
    def costs(self) -> dict[str, float]:
        """Seconds for one of each feature, and `constant` for the step itself."""
        values = (self._costs * self._units).tolist()
        return dict(zip(("constant", *StepFeatures._fields), values, strict=True))

    def predict(self, features: StepFeatures) -> float:
        """Seconds that the step will take; above 0."""
        return max(float(self._costs @ self._regressors(features)), MIN_PREDICTION_S)

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from a measured step. Not of use: 0 seconds or less (a clock that stood still)."""
        if not seconds > 0:
            return
        regressors = self._regressors(features)
        self.num_observed += 1
        if self.num_observed < NUM_FIRST:
            self._first.append((regressors, seconds))
            self._scale_priors()
            return
        if self._first:
            for earlier in self._first:
                self._learn(*earlier)
            self._first.clear()
        self._learn(regressors, seconds)

    def pace(self, seconds: float) -> None:
        """Note how long a step took, whatever was in it."""
        self.mean_step_s += 0.05 * (min(seconds, 10 * self.mean_step_s) - self.mean_step_s)

    def _regressors(self, features: StepFeatures) -> np.ndarray:
        """f64 [1 + features], the constant first: seconds by the priors."""
        regressors: np.ndarray = np.array((1, *features), np.float64) * self._units
        return regressors

    def _scale_priors(self) -> None:
        """One factor for all, so that the first steps are met: another device, another model."""
        ratios = [seconds / float(regressors.sum()) for regressors, seconds in self._first]
        self._costs[:] = np.median(ratios)
        self._start()

    def _start(self) -> None:
        """Know nothing but that the costs are right to within `PRIOR_SD` of themselves."""
        self._information = np.diag((NOISE / (PRIOR_SD * self._costs)) ** 2)
        self._target = self._information @ self._costs

    def _learn(self, regressors: np.ndarray, seconds: float) -> None:
        """Add a step to the normal equations, and move towards their solution that has no cost
        below 0.

        The error is taken relative to the larger of predicted and measured, so it is below 1. Only
        the combination of costs that this step tells of is forgotten a little: what is known of
        kinds of steps that have become rare stays.
        """
        scale = max(float(self._costs @ regressors), seconds, MIN_PREDICTION_S)
        inputs, output = regressors / scale, seconds / scale
        error = abs(output - float(self._costs @ inputs))
        weight = min(HUBER * self._spread / max(error, 1e-12), 1.0)
        towards = 1 + SPREAD_RATE if error > self._spread else 1 - SPREAD_RATE
        self._spread = min(max(self._spread * towards, MIN_SPREAD), MAX_SPREAD)
        information, target = self._information, self._target
        known = information @ inputs
        forgotten = known * (FORGETTING / float(inputs @ known))
        target -= forgotten * float(inputs @ target)
        information -= forgotten[:, None] * known
        target += (weight * output) * inputs
        information += (weight * inputs)[:, None] * inputs
        costs = self._costs.tolist()
        for place, row in enumerate(information):
            slope = float(row @ self._costs) - target[place]
            costs[place] = max(costs[place] - slope / max(row[place], 1e-300), 0.0)
            self._costs[place] = costs[place]


class _Step:
    """An enqueued step; what is in it is looked up when somebody asks."""

    def __init__(self, batch: ScheduledBatch, num_sent: int, enqueued_s: float) -> None:
        self.batch = batch
        self.num_sent = num_sent
        self.enqueued_s = enqueued_s
        self.features: StepFeatures | None = None


class StepTimes:
    """Measures the engine's steps, of which the next is enqueued before the last one is read.

    A step runs from the moment it is enqueued, or from the end of the one before if that is later,
    to the moment its tokens are read. So time without work is in no step. The model learns from
    some: they are many and alike, and learning takes the step thread's time.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        adapter_bytes: Callable[[int], int],
        token_buckets: Sequence[int],
    ) -> None:
        self.model = StepTimeModel()
        self._clock = clock
        self._adapter_bytes = adapter_bytes
        self._token_buckets = token_buckets
        self._last: _Step | None = None
        self._num_unlearnt = 0  # steps since the last one that the model learnt from
        self._unread: deque[_Step] = deque()
        self._read_s = -math.inf  # when the last step's tokens were read

    @property
    def last(self) -> StepFeatures:
        """Of the step that was enqueued last."""
        return NOTHING if self._last is None else self._features(self._last)

    def _features(self, step: _Step) -> StepFeatures:
        if step.features is None:
            step.features = features_of(
                step.batch, self._adapter_bytes, self._token_buckets, num_sent=step.num_sent
            )
        return step.features

    def enqueue(self, batch: ScheduledBatch) -> None:
        """Call before a step is enqueued."""
        num_sent = 0 if self._last is None else len(self._last.batch.sends)
        self._last = _Step(batch, num_sent, self._clock())
        self._unread.append(self._last)

    def read(self) -> None:
        """Call when the tokens of the oldest unread step have been read."""
        step = self._unread.popleft()
        started_s, self._read_s = max(step.enqueued_s, self._read_s), self._clock()
        seconds = self._read_s - started_s
        self.model.pace(seconds)
        self._num_unlearnt += 1
        is_decode = step.batch.rows[-1].num_tokens == 1
        every = LEARN_DECODE_EVERY if is_decode else LEARN_MIXED_EVERY
        if self._num_unlearnt >= every or self.model.num_observed <= NUM_EAGER:
            self._num_unlearnt = 0
            self.model.observe(self._features(step), seconds)

    def busy_s(self, now_s: float) -> float:
        """Predicted seconds until all that is enqueued has ended."""
        if not self._unread:
            return 0.0
        started_s = max(self._unread[0].enqueued_s, self._read_s)
        taken_s = sum([self.model.predict(self._features(step)) for step in self._unread])
        return max(started_s + taken_s - now_s, 0.0)

    def stats(self) -> dict[str, float]:
        """Seconds of a step of late, and the median relative error of the predictions."""
        model = self.model
        return {"mean_s": model.mean_step_s, "error": model.spread, "learnt": model.num_observed}
