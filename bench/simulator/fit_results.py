"""A first model from results that were not recorded step by step: `bench.step`, `bench.offline`.

    python -m bench.simulator.fit_results --step bench/results/nvidia-h200/step-7b.json \\
        --offline bench/results/nvidia-h200/offline-512.json --fit base warm --check cold \\
        --out bench/results/nvidia-h200/simulator-model.json

Offline runs hand in all requests at once, so that their batches do not depend on time: scheduling
the same requests again gives the features of the very steps whose durations were added up by
bucket. The host's part is the mean of its verbs. A recorded run (`bench.record_runs`) shows more,
and takes this one's place.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.clock import SimulatedClock
from bench.record import command
from bench.replay import Replay, ReplayResult
from bench.settings import SETTINGS
from bench.simulator.cost import Cost, device_columns
from bench.simulator.device_model import DeviceModel, constant
from bench.simulator.engine import EngineDescription, register, simulated_core
from bench.simulator.features import FIELDS, StepFeatures
from bench.simulator.fitting import BUS_BYTES_PER_S, BUS_LATENCY_S, Observation, fit_cost
from bench.simulator.geometry import describe_geometry
from bench.simulator.validation import measures
from bench.step_trace import StepTrace
from bench.trace import Request
from checkpoints.model_config import ModelConfig

OTHER_VERBS = ("messages", "schedule", "update", "emit")
STEP_REPEATS = 100  # a case of `bench.step` weighs as so many steps of an engine
KINDS = {"base": (), "s1": SETTINGS["S1"].ranks, "s2": SETTINGS["S2"].ranks}


def offline_engine(result: dict[str, Any]) -> EngineDescription:
    """The engine of an offline result."""
    engine, settings = result["engine"], result["settings"]
    found = describe_geometry(
        settings["geometry"], pool_bytes=1e12, max_num_seqs=settings["max_num_seqs"],
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        max_model_len=engine["max_model_len"], max_rank=engine["max_rank"],
        max_adapter_slots=settings["adapters"] + 16,
    )  # fmt: skip
    scheduler = dataclasses.replace(found.scheduler, num_pages=engine["num_pages"])
    return dataclasses.replace(found, scheduler=scheduler)


def run_offline(
    result: dict[str, Any], mode: str, model: DeviceModel
) -> tuple[ReplayResult, list[StepFeatures]]:
    """The requests of one mode of an offline result, on a simulated device."""
    settings = result["settings"]
    if settings["popularity"] != "distinct":
        raise ValueError(f"popularity: got {settings['popularity']!r}, allowed: 'distinct'")
    engine, clock = offline_engine(result), SimulatedClock()
    core = simulated_core(engine, model, clock)
    ranks = [int(rank) for rank in settings["ranks"].split(",")]
    num = settings["adapters"] if mode != "base" else 0
    register(core, [ranks[i % len(ranks)] for i in range(num)])
    requests = [
        Request(
            arrival_s=0.0, adapter=i % num if num else None, tenant="offline",
            num_prompt_tokens=settings["input"], num_output_tokens=settings["output"],
        )
        for i in range(settings["requests"])
    ]  # fmt: skip
    for _ in range(2 if mode == "warm" else 1):  # the first run of the two installs them
        steps = StepTrace(core, engine, clock.now)
        replayed = Replay(
            core, requests, clock, vocab_size=engine.scheduler.vocab_size,
            prompt=lambda i, r: [0] * r.num_prompt_tokens,
        ).run()  # fmt: skip
        steps.close()
    return replayed, [step.features for step in steps.steps()]


def offline_observations(result: dict[str, Any], mode: str) -> Iterable[Observation]:
    """The mean step of each bucket, as often as there were steps.

    Raises ValueError if scheduling again gives other steps than were measured.
    """
    _, features = run_offline(result, mode, constant(0.01))
    by_bucket = collections.defaultdict(list)
    for step in features:
        by_bucket[step.bucket].append(step)
    measured = result[mode]["buckets"]
    counts = {name: len(found) for name, found in by_bucket.items()}
    last = 1  # the measured loop does not see the end of its last step
    if sum(counts.values()) - sum(b["steps"] for b in measured.values()) > last:
        raise ValueError(f"{mode}: steps {counts} do not agree with those measured: {measured}")
    for name, found in by_bucket.items():
        if name in measured:
            mean_s = measured[name]["seconds"] / measured[name]["steps"]
            yield from [Observation(_mean(found), mean_s)] * measured[name]["steps"]


def _mean(steps: list[StepFeatures]) -> StepFeatures:
    first = steps[0]
    means: dict[str, Any] = {
        name: round(float(np.mean([getattr(step, name) for step in steps])))
        for name in FIELDS
        if not isinstance(getattr(first, name), str)
    }
    return dataclasses.replace(first, **means)


def step_observations(result: dict[str, Any], model: ModelConfig) -> Iterable[Observation]:
    """Decode steps of hand-made batches, and the prefill step of a full budget."""
    settings = result["settings"]
    context = settings["context"] + settings["steps"] // 2
    elements = model.num_layers * sum(sum(model.module_shape(m)) for m in SETTINGS["S1"].modules)
    sizes = [1, 4, 16, 64, 128, 256]
    for case in result["cases"]:
        rows, kind = case["rows"], KINDS[case["kind"]]
        ranks = [kind[i % len(kind)] for i in range(rows)] if kind else []
        size = next(n for n in sizes if n >= rows)
        decode = _features(
            bucket=f"decode-{size}", variant="attention" if kind else "base", num_tokens=rows,
            num_padded=size, num_decoding=rows, num_sampled=rows, context_tokens=rows * context,
            num_adapters=len(ranks), adapter_elements=sum(ranks) * elements,
            adapter_products=sum(ranks) * elements,
        )  # fmt: skip
        yield from [Observation(decode, case["decode_step_s"])] * STEP_REPEATS
        if "prefill_tokens_per_s" in case:
            budget = settings["max_num_batched_tokens"]
            prompts = budget // settings["context"]
            length = settings["context"]
            rank = float(np.mean(kind)) if kind else 0.0
            mixed = _features(
                bucket=f"mixed-{budget}", variant=decode.variant, num_tokens=budget,
                num_padded=budget, num_chunks=prompts, num_resets=prompts, num_sampled=prompts,
                prompt_pairs=prompts * length * (length + 1) // 2, num_adapters=prompts,
                adapter_elements=round(prompts * rank * elements),
                adapter_products=round(budget * rank * elements),
            )  # fmt: skip
            seconds = budget / case["prefill_tokens_per_s"]
            yield from [Observation(mixed, seconds)] * STEP_REPEATS


def _features(**given: Any) -> StepFeatures:
    return StepFeatures(**(dict.fromkeys(FIELDS, 0) | given))


def host_costs(result: dict[str, Any]) -> tuple[Cost, Cost]:
    """`execute` and `between`: means a step, what adapters add, what an install takes.

    A mean of `execute` holds the time that it waited for the device's queue behind large steps. The
    host cannot take longer than the shortest steps took.
    """
    base, warm, cold = result["base"], result["warm"], result["cold"]
    between_s = sum(warm["verbs_s"][verb] for verb in OTHER_VERBS) / warm["steps"]

    def execute_s(mode: dict[str, Any]) -> float:
        verbs = mode["verbs_s"]
        mean_s = (verbs["execute"] - verbs.get("install", 0.0)) / mode["steps"]
        shortest_s = 1e-3 * min(b["median_ms"] for b in mode["buckets"].values() if b["steps"] > 1)
        return float(min(mean_s, shortest_s - between_s))

    adds_s = max(execute_s(warm) - execute_s(base), 0.0)
    execute = {
        "step": execute_s(base), "decode:attention": adds_s, "mixed:attention": adds_s,
        "num_installs": cold["verbs_s"]["install"] / cold["adapter_installs"],
    }  # fmt: skip
    return Cost(execute), Cost({"step": between_s})


def main() -> None:
    args = _parse()
    step, offline = (json.loads(path.read_text()) for path in (args.step, args.offline))
    engine = offline_engine(offline)
    observed = list(step_observations(step, engine.model))
    for mode in args.fit:
        observed += offline_observations(offline, mode)
    device, errors = fit_cost(observed, device_columns)
    execute, between = host_costs(offline)
    model = DeviceModel(
        device=device, execute=execute, between=between, bus_bytes_per_s=BUS_BYTES_PER_S,
        bus_latency_s=BUS_LATENCY_S,
        origin={
            "geometry": engine.geometry, "device": offline["device"],
            "commit": offline["commit"], "command": command(),
            "runs": [args.step.name, *(f"{args.offline.name}:{mode}" for mode in args.fit)],
            "errors": {"device": errors},
        },
    )  # fmt: skip
    checked = [_check(offline, mode, model) for mode in (*args.fit, *args.check)]
    model.origin["checked"] = checked
    model.save(args.out)
    print(json.dumps({"errors": model.origin["errors"], "checked": checked}, indent=1))


def _check(offline: dict[str, Any], mode: str, model: DeviceModel) -> dict[str, Any]:
    """Throughput and median first token of a mode: measured and simulated."""
    simulated, measured = measures(run_offline(offline, mode, model)[0].outcomes), offline[mode]
    pairs = {
        "requests_per_s": (measured["requests_per_s"], simulated["requests_per_s"]),
        "first_token_p50_s": (measured["first_token_s"]["p50"], simulated["first_token_p50_s"]),
    }
    return {"mode": mode} | {
        name: {"measured": real, "simulated": found, "error": abs(found / real - 1)}
        for name, (real, found) in pairs.items()
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step", type=Path, required=True, help="a result of bench.step")
    parser.add_argument("--offline", type=Path, required=True, help="a result of bench.offline")
    parser.add_argument("--fit", nargs="+", default=["base", "warm"], help="modes to fit on")
    parser.add_argument("--check", nargs="*", default=["cold"], help="modes to predict alone")
    parser.add_argument("--out", type=Path, required=True, help="the model, JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
