"""What single steps show that runs do not: few rows, short prompts, an engine that was idle.

`bench.step` times batches that are made by hand, so their features are known; a saturated run has
hardly any such step. `bench.first_token` times a request alone on an idle engine: what its step
does not take of that is the host's.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.simulator.cost import Cost
from bench.simulator.engine import AdapterSizes, EngineDescription
from bench.simulator.features import Capture, FeatureTable, StepFeatures
from bench.simulator.sweep_runs import Interval, one_step
from bench.step_batches import MIXED_TOKENS, row_ranks

WEIGHT = 20.0  # of a step: it is a mean of as many, without what lies between a run's moments


def step_intervals(result: dict[str, Any], engine: EngineDescription) -> list[Interval]:
    """The cases of a result of `bench.step` on the engine's geometry, in bfloat16.

    Raises ValueError: it is of another geometry, or of other weights.
    """
    settings = result["settings"]
    for name, wanted in (("geometry", engine.geometry), ("quantization", None)):
        if settings.get(name) != wanted:
            raise ValueError(f"steps: {name}: got {settings.get(name)!r}, allowed: {wanted!r}")
    context = settings["context"]
    found = []
    for case in result["cases"]:
        kind, rows = case["kind"], case["rows"]
        starts = [context + settings["steps"] // 2] * rows
        ranks = row_ranks(kind, rows)
        seen = [(_features(engine, starts, ranks), case["decode_step_s"])]
        if "mixed_step_s" in case:
            beside = [(MIXED_TOKENS, ranks[0])]
            seen.append((_features(engine, starts, ranks, beside), case["mixed_step_s"]))
        if "prefill_tokens_per_s" in case:
            prompts = max(1, settings["max_num_batched_tokens"] // context)
            prefill_s = prompts * context / case["prefill_tokens_per_s"]
            many = [(context, rank) for rank in row_ranks(kind, prompts)]
            seen.append((_features(engine, [], [], many), prefill_s))
        found += [one_step(features, seconds, WEIGHT) for features, seconds in seen]
    return found


def idle_host_s(result: dict[str, Any], device: Cost, engine: EngineDescription) -> float:
    """Seconds from a request to the start of its step on an idle engine: the mean of what a result
    of `bench.first_token` has beyond the device's part, 0 and up.

    Raises ValueError: it is of another geometry.
    """
    if result["geometry"] != engine.geometry:
        raise ValueError(
            f"first tokens: geometry: got {result['geometry']!r}, allowed: {engine.geometry!r}"
        )
    rests = [
        1e-3 * case["warm_ms"]
        - device.seconds(_features(engine, [], [], [(case["prompt"], case["rank"])]))
        for case in result["cases"]
    ]
    return max(float(np.mean(rests)), 0.0)


def _features(
    engine: EngineDescription,
    starts: Sequence[int],
    ranks: Sequence[int],
    prompts: Sequence[tuple[int, int]] = (),
) -> StepFeatures:
    """Of a step of rows at `starts` and whole prompts (tokens, rank), each with an adapter of its
    own where its rank is not 0.
    """
    table = FeatureTable(engine.model, engine.buckets)
    sizes = AdapterSizes(engine.model, engine.layout)
    slots = []
    for place, rank in enumerate((*ranks, *(rank for _, rank in prompts)), start=1):
        if rank:
            table.bind(place, sizes.packed(f"row-{place}", rank))
        slots.append(place if rank else 0)
    num_rows = len(starts) + len(prompts)
    return table.features(
        Capture(
            starts=array.array("q", (*starts, *(0 for _ in prompts))),
            slots=array.array("q", slots),
            num_single=len(starts),
            num_tokens=len(starts) + sum(tokens for tokens, _ in prompts),
            num_sampled=num_rows,
            chunks=tuple((0, tokens, True) for tokens, _ in prompts),
            installs=(),
            sends=(),
        )
    )
