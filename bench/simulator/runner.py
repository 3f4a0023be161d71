"""`sloraj.batch.Runner` without a device: steps take what a `DeviceModel` says, on a simulated
clock.

    host    schedule N+1 │ execute N+1 │ wait ...│ update N ...
    bus          ... pages sent with N+1 ─────────────────┐
    device  ──── step N ───────────────────┤── step N+1 ──┼──────┤── step N+2, which installs them

The host's time passes in `execute`; `collect` lets the clock sleep until the step has ended. Steps
follow each other on the device. Pages that are sent leave when the step before has ended and travel
beside the step they were sent with; the step that installs them waits for the last one. Pages that
a step installs and that were not sent ahead leave then too, and their step waits for them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.clock import Clock
from bench.simulator.device_model import DeviceModel
from bench.simulator.features import Capture, FeatureTable, StepFeatures
from checkpoints.model_config import ModelConfig
from sloraj.batch import SampledToken, ScheduledBatch, ScheduledRow, StepResult
from sloraj.runner.buckets import Buckets


@dataclasses.dataclass(slots=True)
class SimulatedHandle:
    """An enqueued step, and when it ends."""

    step: int
    sampled: tuple[ScheduledRow, ...]
    features: StepFeatures
    end_s: float


class SimulatedRunner:
    """Samples the same token always. One for each core; core and runner share the clock."""

    def __init__(
        self, buckets: Buckets, model_config: ModelConfig, model: DeviceModel, clock: Clock,
        token_id: int = 0,
    ) -> None:  # fmt: skip
        self._table = FeatureTable(model_config, buckets)
        self.model, self.clock, self.token_id = model, clock, token_id
        self.free_s = clock.now()  # when the device has ended all that is enqueued
        self.arrived_s = 0.0  # when what was sent is there
        self.num_steps = 0
        self.install_bytes = 0
        self.busy_s = 0.0

    def execute(self, batch: ScheduledBatch) -> SimulatedHandle:
        features = self._table.features(Capture.of(batch))
        model, clock = self.model, self.clock
        host_s = model.between.seconds(features) + model.execute.seconds(features)
        begun_s = clock.now()
        clock.sleep_until(begun_s + host_s)
        left_s = max(self.free_s, begun_s, self.arrived_s)
        self.arrived_s = left_s + model.travel_s(features.late_bytes)
        start_s = max(self.arrived_s, clock.now() - model.head_start_s)
        self.arrived_s = start_s + model.travel_s(features.send_bytes)
        device_s = model.device.seconds(features)
        self.free_s = start_s + device_s
        self.num_steps += 1
        self.install_bytes += features.send_bytes + features.late_bytes
        self.busy_s += device_s
        sampled = tuple(row for row in batch.rows if row.samples)
        return SimulatedHandle(batch.step, sampled, features, self.free_s)

    def collect(self, handle: SimulatedHandle) -> StepResult:
        self.clock.sleep_until(handle.end_s)
        token = self.token_id
        tokens = tuple(SampledToken(row.sequence, token, True) for row in handle.sampled)
        return StepResult(handle.step, tokens)

    def stats(self) -> dict[str, Any]:
        return {
            "num_runner_steps": self.num_steps,
            "install_bytes": self.install_bytes,
            "device_busy_s": self.busy_s,
        }
