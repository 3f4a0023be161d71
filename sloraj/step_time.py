"""How long a step takes, learnt from the engine's own steps: features of a batch -> seconds.

    features = features_of(batch, adapter_bytes, token_buckets)
    model.predict(features)             # seconds, above 0
    model.observe(features, seconds)    # one measured step

The prediction is a sum of costs, none below 0, so more work never takes less time. Costs are fitted
online by recursive least squares over relative errors: an outlier (a pause of the collector, a
page fault) counts by its side and not by its size, and the memory is finite, so a device that
slows down is followed. Numpy on the host; deterministic; O(1) memory and time a step.
"""

from __future__ import annotations

import bisect
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

NUM_FIRST = 9  # steps whose median scales the priors before anything is fitted
PRIOR_SD = 3.0  # of a cost, in units of its prior
DRIFT_SD = 0.003  # of a cost, in units of its prior, a step
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
        self._covariance = np.eye(len(self._units)) * PRIOR_SD**2
        self._largest = np.diag(self._covariance).copy()
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
        weight = max(0.05, 1 / self.num_observed)
        self.mean_step_s += weight * (min(seconds, 10 * self.mean_step_s) - self.mean_step_s)
        if self.num_observed < NUM_FIRST:
            self._first.append((regressors, seconds))
            self._scale_priors()
            return
        if self._first:
            for earlier in self._first:
                self._learn(*earlier)
            self._first.clear()
        self._learn(regressors, seconds)

    def _regressors(self, features: StepFeatures) -> np.ndarray:
        """f64 [1 + features], the constant first: seconds by the priors."""
        regressors: np.ndarray = np.array((1, *features), np.float64) * self._units
        return regressors

    def _scale_priors(self) -> None:
        """One factor for all, so that the first steps are met: another device, another model."""
        ratios = [seconds / float(regressors.sum()) for regressors, seconds in self._first]
        self._costs[:] = np.median(ratios)
        self._covariance = np.diag((PRIOR_SD * self._costs) ** 2)
        self._largest = np.diag(self._covariance).copy()

    def _learn(self, regressors: np.ndarray, seconds: float) -> None:
        """One step of a Kalman filter whose state, the costs, drifts a little.

        The error is taken relative to the larger of predicted and measured, so it is below 1.
        """
        scale = max(float(self._costs @ regressors), seconds, MIN_PREDICTION_S)
        inputs = regressors / scale
        error = seconds / scale - float(self._costs @ inputs)
        covariance = self._covariance + np.diag(self._largest * (DRIFT_SD / PRIOR_SD) ** 2)
        excess = max(abs(error) / (HUBER * self._spread), 1.0)
        gain = covariance @ inputs
        gain = gain / (float(inputs @ gain) + excess * (1.5 * self._spread) ** 2)
        self._costs = np.maximum(self._costs + gain * error, 0.0)
        covariance = covariance - np.outer(gain, inputs @ covariance)
        # No direction that the steps of late say nothing about is forgotten beyond the prior.
        shrink = np.minimum(np.sqrt(self._largest / np.maximum(np.diag(covariance), 1e-300)), 1.0)
        self._covariance = (covariance + covariance.T) / 2 * np.outer(shrink, shrink)
        towards = 1 + SPREAD_RATE if abs(error) > self._spread else 1 - SPREAD_RATE
        self._spread = min(max(self._spread * towards, MIN_SPREAD), MAX_SPREAD)


class StepTimer:
    """Seconds of enqueued steps, of which the next one may be enqueued before the last is read.

    A step runs from the moment it is enqueued, or from the end of the one before if that is later,
    to the moment its tokens are read. So time without work is in no step.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._read_s = 0.0  # when the last step's tokens were read

    def enqueue(self) -> float:
        """Call before a step is enqueued; give the result to `read`."""
        return self._clock()

    def read(self, enqueued_s: float) -> float:
        """The seconds of the step whose tokens have just been read."""
        started_s, self._read_s = max(enqueued_s, self._read_s), self._clock()
        return self._read_s - started_s
