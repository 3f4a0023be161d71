"""A first model from results that were not recorded step by step: `bench.step`, `bench.offline`.

    python -m bench.simulator.fit_results --results bench/results/nvidia-h200 --step step-7b.json \\
        --fit offline-1000.json:base offline-1000.json:warm \\
        --check offline-1000.json:cold offline-512.json:base offline-512.json:warm \\
        --out bench/results/nvidia-h200/simulator-model.json

Offline runs hand in all requests at once, so that their batches do not depend on time: scheduling
the same requests again gives the features of the very steps whose durations were added up by
bucket. The host's part is the mean of its verbs. The runs under --check are predicted, and become
entries of the summary. A recorded run (`bench.record_runs`) shows more, and takes this one's place.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from collections.abc import Iterable, Sequence
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
from bench.simulator.validation import measures, table, targets
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
    engine, clock = offline_engine(result), SimulatedClock()
    core = simulated_core(engine, model, clock)
    ranks = [int(rank) for rank in settings["ranks"].split(",")]
    num = settings["adapters"] if mode != "base" else 0
    register(core, [ranks[i % len(ranks)] for i in range(num)])
    requests = [
        Request(
            arrival_s=0.0, adapter=adapter if num else None, tenant="offline",
            num_prompt_tokens=settings["input"], num_output_tokens=settings["output"],
        )
        for adapter in drawn_adapters(settings, engine.scheduler.vocab_size)
    ]  # fmt: skip
    for _ in range(2 if mode == "warm" else 1):  # the first run of the two installs them
        steps = StepTrace(core, engine, clock.now)
        replayed = Replay(
            core, requests, clock, vocab_size=engine.scheduler.vocab_size,
            prompt=lambda i, r: [0] * r.num_prompt_tokens,
        ).run()  # fmt: skip
        steps.close()
    return replayed, [step.features for step in steps.steps()]


def drawn_adapters(settings: dict[str, Any], vocab_size: int) -> list[int]:
    """The adapter of each request, as `bench.offline` draws them: after the prompts."""
    num, num_adapters = settings["requests"], settings["adapters"]
    if settings["popularity"] == "distinct":
        return [i % num_adapters for i in range(num)]
    rng = np.random.default_rng(0)
    rng.integers(3, vocab_size, (num, settings["input"]), dtype=np.int32)
    exponent = 1.0 if settings["popularity"] == "zipf" else 0.0
    weights = 1.0 / np.arange(1, num_adapters + 1) ** exponent
    drawn: list[int] = rng.choice(num_adapters, num, p=weights / weights.sum()).tolist()
    return drawn


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
    """`execute` and `between`: means a step, what adapters add, what an install takes (of the mode
    that reads adapters from disk, so that the cold one is left to be predicted).

    A mean of `execute` holds the time that it waited for the device's queue behind large steps. The
    host cannot take longer than the shortest steps took.
    """
    base, warm, disk = result["base"], result["warm"], result["disk"]
    between_s = sum(warm["verbs_s"][verb] for verb in OTHER_VERBS) / warm["steps"]

    def execute_s(mode: dict[str, Any]) -> float:
        verbs = mode["verbs_s"]
        mean_s = (verbs["execute"] - verbs.get("install", 0.0)) / mode["steps"]
        shortest_s = 1e-3 * min(b["median_ms"] for b in mode["buckets"].values() if b["steps"] > 1)
        return float(min(mean_s, shortest_s - between_s))

    adds_s = max(execute_s(warm) - execute_s(base), 0.0)
    execute = {
        "step": execute_s(base), "decode:attention": adds_s, "mixed:attention": adds_s,
        "num_installs": disk["verbs_s"]["install"] / disk["adapter_installs"],
    }  # fmt: skip
    return Cost(execute), Cost({"step": between_s})


def fit_results(directory: Path, step: str, fitted: Sequence[tuple[str, str]]) -> DeviceModel:
    """A model from a step result and (offline result, mode) pairs, named as files of a directory.
    The host is that of the first.
    """
    results = {name: read_result(directory, name) for name in {name for name, _ in fitted}}
    first = results[fitted[0][0]]
    engine = offline_engine(first)
    observed = list(step_observations(read_result(directory, step), engine.model))
    for name, mode in fitted:
        observed += offline_observations(results[name], mode)
    device, errors = fit_cost(observed, device_columns)
    execute, between = host_costs(first)
    # No result shows what a step waits for a copy that was not sent ahead: the bus says it.
    late = {"late_bytes": 1 / BUS_BYTES_PER_S}
    return DeviceModel(
        device=Cost(late | device.coefficients), execute=execute, between=between,
        bus_bytes_per_s=BUS_BYTES_PER_S, bus_latency_s=BUS_LATENCY_S,
        origin={
            "geometry": engine.geometry, "device": first["device"], "commit": first["commit"],
            "command": command(), "runs": [step, *map(":".join, fitted)],
            "errors": {"device": errors},
        },
    )  # fmt: skip


def read_result(directory: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / name).read_text())
    return found


def check(result: dict[str, Any], name: str, mode: str, model: DeviceModel) -> dict[str, Any]:
    """Throughput and median first token of a mode, measured and simulated: as
    `bench.simulator.validation.compare`.
    """
    simulated, real = measures(run_offline(result, mode, model)[0].outcomes), result[mode]
    measured = {
        "requests_per_s": real["requests_per_s"], "first_token_p50_s": real["first_token_s"]["p50"]
    }  # fmt: skip
    predicted = {key: simulated[key] for key in measured}
    errors = [abs(predicted[key] / measured[key] - 1) for key in measured]
    return {
        "run": f"{name}:{mode}", "measured": measured, "predicted": predicted,
        "throughput_error": errors[0], "first_token_error": errors[1],
    }  # fmt: skip


def main() -> None:
    args = _parse()
    fitted, checked = (
        [tuple(words.split(":", 1)) for words in given] for given in (args.fit, args.check)
    )
    both = set(fitted) & set(checked)
    if both:
        raise SystemExit(f"bench.simulator.fit_results: {sorted(both)} to fit and to check")
    model = fit_results(args.results, args.step, fitted)
    compared = [check(read_result(args.results, name), name, mode, model) for name, mode in checked]
    model.origin["compared"] = compared
    model.origin["targets"] = targets(compared)
    model.save(args.out)
    print(json.dumps(model.origin["errors"], indent=1))
    print(table(compared))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="directory of the results")
    parser.add_argument("--step", required=True, help="a result of bench.step in it")
    parser.add_argument("--fit", nargs="+", required=True, metavar="FILE:MODE",
                        help="modes of results of bench.offline to fit on")  # fmt: skip
    parser.add_argument("--check", nargs="*", default=[], metavar="FILE:MODE", help="to predict")
    parser.add_argument("--out", type=Path, required=True, help="the model, JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
