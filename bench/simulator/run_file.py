"""A recorded run as a file: the engine, every step with its features and moments, every request.

JSONL with a header (`bench.records`), then lines of up to 256 steps or requests each, as plain
rows: about 130 bytes a step. Moments are seconds on one clock with an arbitrary origin for steps,
and from the start of the trace for requests.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.outcome import Outcome
from bench.points import Point
from bench.records import RecordError, RecordFile, read_records
from bench.simulator.engine import EngineDescription
from bench.simulator.features import FIELDS, StepFeatures
from bench.trace import Request

BENCH = "step-trace"
ROWS = 256
MOMENTS = ("started_s", "enqueued_s", "asked_s", "read_s")
REQUEST_FIELDS = (
    "arrival_s", "adapter", "tenant", "num_prompt_tokens", "num_wanted_tokens", "first_token_s",
    "last_token_s", "ended_s", "num_output_tokens", "error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class TracedStep:
    """A step and its moments: `execute` from `started_s` to `enqueued_s`, `collect` from `asked_s`
    to `read_s`. `is_ahead`: the step before was not read yet when this one was enqueued.
    """

    features: StepFeatures
    started_s: float
    enqueued_s: float
    asked_s: float
    read_s: float
    is_ahead: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """One run: `adapter_ranks[i]` is the rank of the adapter that a request calls i."""

    name: str
    head: dict[str, Any]
    engine: EngineDescription
    adapter_ranks: list[int]
    steps: list[TracedStep]
    outcomes: list[Outcome]
    point: Point | None = None  # of a sweep

    @property
    def trace(self) -> list[Request]:
        return [
            Request(
                arrival_s=o.arrival_s, adapter=o.adapter, tenant=o.tenant,
                num_prompt_tokens=o.num_prompt_tokens, num_output_tokens=o.num_wanted_tokens,
            )
            for o in self.outcomes
        ]  # fmt: skip


def run_settings(
    engine: EngineDescription, adapter_ranks: Sequence[int], **workload: Any
) -> dict[str, Any]:
    """The "settings" of a run file's header."""
    return {
        "engine": engine.as_dict(),
        "adapter_ranks": list(adapter_ranks),
        "workload": workload,
        "step_fields": [*FIELDS, *MOMENTS, "is_ahead"],
        "request_fields": list(REQUEST_FIELDS),
    }


def write_run(
    path: Path, head: dict[str, Any], steps: Iterable[TracedStep], outcomes: Iterable[Outcome]
) -> None:
    """Raises RecordError if there is such a file."""
    with RecordFile.create(path, head) as file:
        rows = (
            [getattr(step.features, name) for name in FIELDS]
            + [round(getattr(step, name), 7) for name in MOMENTS]
            + [step.is_ahead]
            for step in steps
        )
        requests = ([getattr(outcome, name) for name in REQUEST_FIELDS] for outcome in outcomes)
        for kind, found in (("steps", rows), ("requests", requests)):
            for some in _batched(found):
                file.append({kind: some})


def _batched(rows: Iterable[list[Any]]) -> Iterable[list[list[Any]]]:
    iterator = iter(rows)
    while some := list(itertools.islice(iterator, ROWS)):
        yield some


def read_run(path: Path) -> RecordedRun:
    """Raises RecordError if the file is no recorded run, or one with other fields."""
    head, records = read_records(path)
    if head.get("bench") != BENCH:
        raise RecordError(f"{path}: bench is {head.get('bench')!r}, allowed: {BENCH!r}")
    settings = head["settings"]
    if settings["step_fields"] != [*FIELDS, *MOMENTS, "is_ahead"]:
        raise RecordError(f"{path}: steps of {settings['step_fields']}, allowed: those of today")
    num_features = len(FIELDS)
    steps: list[TracedStep] = []
    outcomes: list[Outcome] = []
    for record in records:
        for row in record.get("steps", ()):
            steps.append(TracedStep(StepFeatures(*row[:num_features]), *row[num_features:]))
        for row in record.get("requests", ()):
            outcomes.append(
                Outcome(index=len(outcomes), **dict(zip(REQUEST_FIELDS, row, strict=True)))
            )
    return RecordedRun(
        name=path.stem, head=head, engine=EngineDescription.of(settings["engine"]),
        adapter_ranks=settings["adapter_ranks"], steps=steps, outcomes=outcomes,
    )  # fmt: skip
