"""What each step of a run did and how long its parts took: the runs that simulators are fitted on.

    trace = StepTrace(core, describe(core, "llama-7b"))
    result = Replay(core, requests, clock, ...).run()
    trace.close()
    write_run(path, head, trace.steps(), result.outcomes)

While it runs, it costs some 15 us a step of 64 rows and 30 us of 256, after the step was enqueued:
it copies numbers, from which features are computed afterwards. Works on any runner.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.simulator.engine import EngineDescription
from bench.simulator.features import Capture, FeatureTable
from bench.simulator.run_file import TracedStep
from sloraj.batch import ScheduledBatch, StepResult
from sloraj.core import EngineCore

_Raw = tuple[Capture, float, float, bool]


def describe(core: EngineCore, geometry: str) -> EngineDescription:
    """The resolved numbers of a core with a `DeviceRunner`."""
    runner: Any = core._runner
    return EngineDescription(
        geometry=geometry, model=runner._model.spec.config, layout=runner._config.layout,
        scheduler=core._config, buckets=runner._buckets,
    )  # fmt: skip


class StepTrace:
    """Wraps a core's runner until it is closed."""

    def __init__(
        self,
        core: EngineCore,
        description: EngineDescription,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        runner: Any = core._runner
        self._runner, self._description, self._now = runner, description, now
        self._execute, self._collect = runner.execute, runner.collect
        self._resident = [
            (resident.slot, resident.version.packed)
            for resident in core._residency._residents.values()
        ]
        self._executed: list[_Raw] = []
        self._collected: list[tuple[float, float]] = []
        runner.execute, runner.collect = self._timed_execute, self._timed_collect

    def close(self) -> None:
        self._runner.execute, self._runner.collect = self._execute, self._collect

    def _timed_execute(self, batch: ScheduledBatch) -> Any:
        started = self._now()
        handle = self._execute(batch)
        ended = self._now()
        is_ahead = len(self._executed) > len(self._collected)
        self._executed.append((Capture.of(batch), started, ended, is_ahead))
        return handle

    def _timed_collect(self, handle: Any) -> StepResult:
        started = self._now()
        result: StepResult = self._collect(handle)
        self._collected.append((started, self._now()))
        return result

    def steps(self) -> list[TracedStep]:
        """All steps that were read, in order."""
        table = FeatureTable(self._description.model, self._description.buckets)
        for slot, packed in self._resident:
            table.bind(slot, packed)
        steps = []
        for (capture, started, ended, is_ahead), (asked, read) in zip(
            self._executed, self._collected, strict=False
        ):
            steps.append(TracedStep(table.features(capture), started, ended, asked, read, is_ahead))
        return steps
