"""Routing and placement compared on a fleet that nobody has: by default 1,000 replicas and
1,000,000 registered adapters.

    python -m bench.simulator.fleet --model bench/results/nvidia-h200/simulator-model.json \\
        --load 0.8 --out bench/results/nvidia-h200/fleet.jsonl
    python -m bench.simulator.fleet --model bench/results/nvidia-h200/simulator-model.json --quick

Requests are a Poisson process over adapters of Zipf's popularity, whose ranks are those of a
setting of the paper in random order. Load is in parts of what the replicas would serve of the base
model at saturation. One record a policy; a run that was cut short goes on with the next one.
SIMULATED: engines are real code, devices a fitted model, networks an assumption (`HostTier`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.records import RecordError, RecordFile, header
from bench.settings import SETTINGS
from bench.simulator.device_model import DeviceModel
from bench.simulator.fleet_run import Fleet, measure, run_fleet
from bench.simulator.geometry import describe_geometry
from bench.simulator.host_tier import HostTier
from bench.simulator.placement import Placement
from bench.simulator.routers import (
    AdapterAware,
    BoundedHash,
    HashAffinity,
    HashRing,
    LeastLoaded,
    Random,
    RoundRobin,
    Router,
    mixed_bits,
)
from bench.simulator.saturation import saturated_rate
from bench.trace import Request

QUICK = {"replicas": 6, "adapters": 3000, "duration": 4.0, "warm": 1.0, "cool": 0.5, "host_gb": 8.0}


def main() -> None:
    args = _parse()
    try:
        model = DeviceModel.load(args.model)
    except (OSError, ValueError) as exc:
        raise SystemExit(f"bench.simulator.fleet: {exc}") from exc
    fleet = make_fleet(args, model)
    saturated = saturated_rate(
        fleet.engine, model, inputs=tuple(args.input), outputs=tuple(args.output)
    )
    rate = args.load * saturated * args.replicas
    end_s = args.warm + args.duration + args.cool
    trace = make_trace(fleet, rate, end_s, tuple(args.input), tuple(args.output))
    head = _header(args, model, saturated)
    records = _run(args, fleet, trace, head, end_s)
    print(f"{rate:.0f} requests/s offered; a replica is saturated by {saturated:.2f} of the base")
    print(table(records))


def _run(
    args: argparse.Namespace, fleet: Fleet, trace: Sequence[Request], head: dict[str, Any],
    end_s: float,
) -> list[dict[str, Any]]:  # fmt: skip
    file = None
    try:
        file = RecordFile.resume(args.out, head) if args.out else None
    except RecordError as exc:
        raise SystemExit(f"bench.simulator.fleet: {exc}") from exc
    found = {record["policy"]: record for record in (file.records if file else ())}
    for policy, make in routers(fleet).items():
        if policy in found or policy not in args.policies:
            continue
        with tqdm(total=round(end_s, 1), desc=policy, unit="s", disable=None) as bar:
            result = run_fleet(
                fleet, make(), trace, end_s, lambda now_s: bar.update(round(now_s - bar.n, 6))
            )
        record = {"policy": policy} | measure(
            result, from_s=args.warm, to_s=args.warm + args.duration
        )
        found[policy] = record
        if file is not None:
            file.append(record)
    if file is not None:
        file.close()
    return [found[policy] for policy in args.policies]


def make_fleet(args: argparse.Namespace, model: DeviceModel) -> Fleet:
    ranks = np.array(SETTINGS[args.setting].ranks)
    longest = args.input[1] + args.output[1]
    return Fleet(
        engine=describe_geometry(
            model.origin["geometry"], pool_bytes=args.pool_gb * 1e9,
            max_num_seqs=args.max_num_seqs, max_model_len=longest, max_rank=int(ranks.max()),
        ),
        model=model,
        tier=HostTier(
            capacity_bytes=args.host_gb * 1e9, fetch_latency_s=args.fetch_latency,
            fetch_bytes_per_s=args.fetch_gb * 1e9,
        ),
        num_replicas=args.replicas,
        popularity=zipf(args.adapters, args.zipf),
        # Not by popularity: else one replica in four would have all the large ones.
        ranks=ranks[mixed_bits(np.arange(args.adapters) + (1 << 50)) % np.uint64(len(ranks))],
        seed=args.seed,
    )  # fmt: skip


def zipf(num_adapters: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def make_trace(
    fleet: Fleet, rate: float, end_s: float, inputs: tuple[int, int], outputs: tuple[int, int]
) -> list[Request]:
    """Poisson arrivals until `end_s`; lengths uniform over [from, to)."""
    rng = np.random.RandomState(fleet.seed)
    num = rng.poisson(rate * end_s)
    arrivals = np.sort(np.round(rng.random_sample(num) * end_s, 6))
    cumulative = np.cumsum(fleet.popularity)
    adapters = np.searchsorted(cumulative / cumulative[-1], rng.random_sample(num), side="right")
    columns = (arrivals, adapters, rng.randint(*inputs, num), rng.randint(*outputs, num))
    return [
        Request(
            arrival_s=arrival, adapter=adapter, tenant="", num_prompt_tokens=prompt,
            num_output_tokens=output,
        )
        for arrival, adapter, prompt, output in zip(*(c.tolist() for c in columns), strict=True)
    ]  # fmt: skip


def cost_of_rank(fleet: Fleet) -> dict[int, float]:
    """What a request takes of a replica, relative to others, by its adapter's rank: the device's
    fixed part of a decode step of 64 rows, and the reading of its adapter in each.
    """
    coefficients = fleet.model.device.coefficients
    sizes = [sum(fleet.engine.model.module_shape(m)) for m in SETTINGS["S1"].modules]
    elements = fleet.engine.model.num_layers * sum(sizes)
    names = ("decode:adapter_elements", "decode:adapter_products")
    per_element = sum(coefficients.get(name, 0.0) for name in names)
    fixed = coefficients.get("bucket:decode-64", coefficients.get("step", 0.0)) / 64
    return {int(r): fixed + per_element * elements * int(r) for r in np.unique(fleet.ranks)}


def routers(fleet: Fleet) -> dict[str, Callable[[], Router]]:
    """By name: a new router for each run."""
    num = fleet.num_replicas
    ring = HashRing(num, len(fleet.popularity))

    def placed(by_rank: bool) -> Router:
        costs = cost_of_rank(fleet)
        return Placement(num, fleet.popularity, fleet.ranks, costs, by_rank=by_rank)

    return {
        "random": Random,
        "round robin": RoundRobin,
        "least loaded": LeastLoaded,
        "hash": lambda: HashAffinity(ring),
        "bounded hash": lambda: BoundedHash(ring),
        "adapter-aware": lambda: AdapterAware(ring),
        "placement": lambda: placed(False),
        "placement by rank": lambda: placed(True),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """For people to read, as Markdown."""
    lines = [
        "| policy | requests/s | first token p50, s | p99, s | within 1 s | 6 s | host misses | "
        "fetched, GB/s | installs a request | busy, mean | most |",
        "|" + " --- |" * 11,
    ]

    def seconds(value: float | None) -> str:
        return "never" if value is None else f"{value:.3f}"

    for r in records:
        lines.append(
            f"| {r['policy']} | {r['requests_per_s']:.0f} | {seconds(r['first_token_p50_s'])} | "
            f"{seconds(r['first_token_p99_s'])} | {r['attainment_1s']:.1%} | "
            f"{r['attainment_6s']:.1%} | {r['host_miss_share']:.1%} | "
            f"{r['fetched_bytes_per_s'] / 1e9:.1f} | {r['installs_per_request']:.2f} | "
            f"{r['busy_mean']:.2f} | {r['busy_max']:.2f} |"
        )
    return "\n".join(lines)


def _header(args: argparse.Namespace, model: DeviceModel, saturated: float) -> dict[str, Any]:
    left_out = ("out", "policies", "commit", "quick", "seed", "model")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    settings |= {"saturated_per_replica": saturated, "model": _origin(model)}
    device = f"simulated fleet of {model.origin['device']}"
    return header(
        bench="fleet", device=device, settings=json.loads(json.dumps(settings)), seed=args.seed,
        commit_name=args.commit,
    )  # fmt: skip


def _origin(model: DeviceModel) -> dict[str, Any]:
    return {k: model.origin[k] for k in ("device", "commit", "runs") if k in model.origin}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    names = ["random", "round robin", "least loaded", "hash", "bounded hash", "adapter-aware",
             "placement", "placement by rank"]  # fmt: skip
    parser.add_argument("--model", type=Path, required=True, help="a fitted model")
    parser.add_argument("--policies", nargs="+", choices=names, default=names)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=1_000_000)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the popularity")
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="S2", help="for its ranks")
    parser.add_argument("--load", type=float, default=0.8, help="of the base's saturated rate")
    parser.add_argument("--input", type=int, nargs=2, default=[512, 2048], help="[from, to)")
    parser.add_argument("--output", type=int, nargs=2, default=[64, 512], help="[from, to)")
    parser.add_argument("--duration", type=float, default=12.0, help="measured seconds")
    parser.add_argument("--warm", type=float, default=10.0, help="seconds before them")
    parser.add_argument("--cool", type=float, default=3.0, help="seconds after them")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--pool-gb", type=float, default=64.0, help="pages of each replica")
    parser.add_argument("--host-gb", type=float, default=128.0, help="for adapters, each replica")
    parser.add_argument("--fetch-gb", type=float, default=3.0, help="per second, each replica")
    parser.add_argument("--fetch-latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK}: seconds, for tests")
    parser.add_argument("--commit", help="of this tree, where it is no repository")
    parser.add_argument("--out", type=Path, help="records, JSONL")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


if __name__ == "__main__":
    main()
