"""What one GPU's machine cannot hold: the paper's largest settings and its tensor-parallel figure.

    python -m bench.simulator.beyond --model bench/results/nvidia-h200/simulator-model.json \\
        --out bench/results/nvidia-h200/simulated-beyond.json

SIMULATED throughout. Throughput at saturation on prompts and answers of the paper's lengths, all
adapters in host memory, asked for uniformly:

- S2 with 200 to 2,000 adapters on one GPU (copies for 2,000 take more host memory than is there);
- S5, S6 and S7 on 2, 4 and 8 GPUs: the base alone, with adapters, and with adapters whose
  collectives took no time. The fitted model is scaled as `bench.simulator.scaling` says.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.record import command, commit, record
from bench.settings import LENGTHS, SETTINGS
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import EngineDescription
from bench.simulator.geometry import describe_geometry, device_pool_bytes, model_config
from bench.simulator.saturation import saturated_rate
from bench.simulator.scaling import Link, scaled

PARALLEL = [("S5", 2), ("S5", 4), ("S7", 2), ("S7", 4), ("S6", 2), ("S6", 4), ("S6", 8)]
COUNTS = {"one GPU": (0, 200, 1000, 2000), "parallel": (10, 100)}


def engine_of(setting: str, tp: int, max_num_seqs: int, num_adapters: int) -> EngineDescription:
    """The engine on `tp` GPUs, its pool what the weights leave."""
    name = SETTINGS[setting].geometry
    return describe_geometry(
        name, pool_bytes=device_pool_bytes(name, tp), max_num_seqs=max_num_seqs,
        max_model_len=2 * LENGTHS[1], max_rank=max(SETTINGS[setting].ranks), tp=tp,
        max_adapter_slots=max(num_adapters, 1),
    )  # fmt: skip


def points(model: DeviceModel, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for every number."""
    link = Link(
        all_reduce_s=args.all_reduce_us * 1e-6, all_gather_s=args.all_gather_us * 1e-6,
        bytes_per_s=args.link_gb * 1e9,
    )  # fmt: skip
    source = model_config(model.origin["geometry"])
    for num_adapters in COUNTS["one GPU"]:
        engine = engine_of("S2", 1, args.max_num_seqs, num_adapters)
        yield _point(
            "S2", engine, model, num_adapters, args, "adapters" if num_adapters else "base"
        )
    for setting, tp in PARALLEL:
        base: dict[str, Any] = {}
        for num_adapters in COUNTS["parallel"]:
            engine = engine_of(setting, tp, args.max_num_seqs, num_adapters)
            for kind, count, has_collectives in (
                ("base", 0, True), ("adapters without collectives", num_adapters, False),
                ("adapters", num_adapters, True),
            ):  # fmt: skip
                own = scaled(model, source, engine, link, has_lora_collectives=has_collectives)
                if kind != "base":
                    yield _point(setting, engine, own, count, args, kind)
                    continue
                base = base or _point(setting, engine, own, count, args, kind)
                yield base | {"adapters": num_adapters}  # beside which it stands in the figure


def _point(
    setting: str, engine: EngineDescription, model: DeviceModel, num_adapters: int,
    args: argparse.Namespace, kind: str,
) -> dict[str, Any]:  # fmt: skip
    per_s = saturated_rate(
        engine, model, inputs=LENGTHS, outputs=LENGTHS, num_requests=args.requests,
        ranks=SETTINGS[setting].adapter_ranks(num_adapters),
    )  # fmt: skip
    return {
        "setting": setting, "gpus": engine.layout.tp, "adapters": num_adapters, "kind": kind,
        "requests_per_s": per_s,
    }  # fmt: skip


def main() -> None:
    args = _parse()
    try:
        model = DeviceModel.load(args.model)
    except (OSError, ValueError) as exc:
        raise SystemExit(f"bench.simulator.beyond: {exc}") from exc
    found = list(tqdm(points(model, args), desc="simulated", unit="point", disable=None))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "commit", "model")}
    result = {
        "bench": "simulated-beyond",
        "device": f"simulated {model.origin['device']}",
        "commit": args.commit or commit(),
        "command": command(),
        "settings": settings,
        "model": {k: model.origin.get(k) for k in ("device", "commit", "runs")},
        "points": found,
    }
    record(result, args.out)
    print(table(found))


def table(found: list[dict[str, Any]]) -> str:
    """For people to read, as Markdown: each number over the base of the same engine."""
    base = {(p["setting"], p["gpus"]): p["requests_per_s"] for p in found if p["kind"] == "base"}
    lines = [
        "| setting | GPUs | adapters | what | requests/s | of base |", "|" + " --- |" * 6,
    ]  # fmt: skip
    for p in found:
        share = p["requests_per_s"] / base[p["setting"], p["gpus"]]
        lines.append(
            f"| {p['setting']} | {p['gpus']} | {p['adapters']} | {p['kind']} | "
            f"{p['requests_per_s']:.2f} | {share:.1%} |"
        )
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a fitted model")
    parser.add_argument("--requests", type=int, default=1500, help="of each point, all at once")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--all-reduce-us", type=float, default=12.0, help="latency")
    parser.add_argument("--all-gather-us", type=float, default=8.0, help="latency")
    parser.add_argument("--link-gb", type=float, default=350.0, help="a second and direction")
    parser.add_argument("--commit", help="of this tree, where it is no repository")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
