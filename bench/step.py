"""Time of a step on the device against its floor: decode and prefill, with adapters and without.

    python -m bench.step --geometry llama-7b --batches 1,8,64,256 --out bench/results/.../step.json

"s1": every row has an adapter of its own, of rank 8 on q, k, v, o; "s2": ranks 64, 32, 16, 8 in
turn. "mixed": 64 rows decode beside a prompt of 192 tokens. Steps are enqueued back to back by
hand, so this is the device's rate, without the engine's host work. Weights and prompts are random.
`--profile` adds the kernels of one of the cases.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from bench.floors import Peaks
from bench.geometries import GEOMETRIES, write_geometry
from bench.peaks import measure_peaks
from bench.profile_step import profile
from bench.random_adapters import random_adapter_loader
from bench.record import command, commit, record
from bench.step_batches import MIXED_ROWS, MIXED_TOKENS, RANKS, row_ranks
from bench.step_driver import StepDriver
from bench.step_floor import decode_floor_s, prefill_floor_s
from bench.summary import target
from checkpoints.hf_config import read_model_config
from checkpoints.model_config import ModelConfig
from sloraj.batch import PackedAdapter
from sloraj.build import build_runner
from sloraj.config import EngineConfig, PoolLayout, resolve
from sloraj.environment import prepare_jax
from sloraj.model.weights import random_parameters
from sloraj.parallel.mesh import make_mesh
from sloraj.request import Sequence
from sloraj.runner.buckets import make_buckets
from sloraj.runner.compiles import Key
from sloraj.runner.jobs import INSTALL_PAGES
from sloraj.runner.lora_variants import MODULES

ABSOLUTE_MS = {"base": 8.7, "s1": 9.0, "s2": 9.8}  # Llama-7B, 64 rows, context 512
NUM_MIXED = 12
NOT_RECORDED = ("out", "cache_dir", "commit", "against")


class Bench:
    """One runner, with adapters of every rank packed once and installed as often as rows need."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        prepare_jax(args.cache_dir)
        self.peaks = measure_peaks() if args.measure_peaks else Peaks()  # before memory is taken
        self.args, self.config = args, read_model_config(model)
        mesh = make_mesh(1)
        rows = max(args.batches)
        engine = resolve(
            EngineConfig(
                model=model, random_weights=True, max_num_seqs=rows,
                max_num_batched_tokens=args.max_num_batched_tokens, max_rank=64,
                max_model_len=args.context + 256, max_adapter_slots=2 * rows + 8,
                kernels=args.kernels, quantization=args.quantization,
            ),
            jax.default_backend(),
        )  # fmt: skip
        assert engine.dtype is not None
        ends, layers = random_parameters(
            self.config, mesh, jax.numpy.dtype(engine.dtype), 0, args.quantization
        )
        self.runner, _, layout, self.info = build_runner(
            engine, self.config, mesh, ends, layers, lambda *_: None, only=_needed(args)
        )
        self.packed = _packed(self.config, layout)

    def case(self, rows: int, name: str) -> dict[str, Any]:
        """One batch size and kind of rows: prefill, then decode."""
        args = self.args
        info = self.info
        driver = StepDriver(
            self.runner, page_size=info["page_size"], num_pages=info["num_pages"],
            vocab_size=self.config.vocab_size,
        )  # fmt: skip
        ranks = row_ranks(name, rows)
        slots = [driver.install(self.packed[rank]) if rank else 0 for rank in ranks]
        sequences = driver.open_rows(slots, args.context)
        prompts = max(1, args.max_num_batched_tokens // args.context)
        prefill_s = driver.prefill(sequences, prompts)
        decode_s = min(driver.decode(sequences, args.steps) for _ in range(args.repeats))
        floor_s = decode_floor_s(
            self.config, self.peaks, context=args.context + args.steps // 2, ranks=ranks,
            weight_bytes=1 if args.quantization else 2,
        )  # fmt: skip
        result: dict[str, Any] = {
            "rows": rows,
            "kind": name,
            "decode_step_s": decode_s,
            "decode_floor_s": floor_s,
            "decode_over_floor": decode_s / floor_s,
        }
        if prefill_s is not None and rows % prompts == 0:
            floor = prefill_floor_s(self.config, self.peaks, prompts=prompts, length=args.context)
            result |= {
                "prefill_tokens_per_s": prompts * args.context / prefill_s,
                "prefill_floor_share": floor / prefill_s,
            }
        if rows == MIXED_ROWS and max(args.batches) >= rows + NUM_MIXED:
            result["mixed_step_s"] = driver.mixed(sequences, self.others(driver, slots))
            if rows == args.profile:
                others = self.others(driver, slots)
                result["mixed_profile"] = profile(
                    lambda: driver.mixed(sequences, others), len(others)
                )
        if rows == args.profile:
            result["profile"] = profile(lambda: driver.decode(sequences, 7), 8)
            again = driver.open_rows(slots[: 2 * prompts], args.context)
            result["prefill_profile"] = profile(
                lambda: driver.prefill(again, prompts), len(again) / prompts
            )
        return result

    def others(self, driver: StepDriver, slots: list[int]) -> list[Sequence]:
        """Prompts to compute beside the rows, on rows and with adapters of their own."""
        return driver.open_rows(slots[-NUM_MIXED:], MIXED_TOKENS, first_row=MIXED_ROWS)


def _needed(args: argparse.Namespace) -> list[Key]:
    """The programs that the cases run."""
    buckets = make_buckets(max(args.batches), args.max_num_batched_tokens, 16, 64)
    steps = [buckets.pick(rows, True) for rows in args.batches]
    steps += [buckets.pick(min(args.max_num_batched_tokens, args.context), False)]
    steps += [buckets.mixed[-1], buckets.pick(MIXED_ROWS + MIXED_TOKENS, False)]
    return [
        *{("forward", bucket.name, kind) for bucket in steps for kind in MODULES},
        *{("sample", "greedy", bucket.num_logits) for bucket in steps},
        *(("install", n) for n in INSTALL_PAGES), ("bind",), ("reset",), ("count",),
    ]  # fmt: skip


def _packed(config: ModelConfig, layout: PoolLayout) -> dict[int, PackedAdapter]:
    load = random_adapter_loader(config, layout, 64)
    return {rank: load(f"random:{rank}:0")[0] for rank in (8, 16, 32, 64)}


def main() -> None:
    args = _parse()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, write_geometry(args.geometry, Path(scratch)))
    startup_s = time.perf_counter() - started
    cases = [bench.case(rows, name) for rows in args.batches for name in args.kinds]
    result = {
        "bench": "step",
        "command": command(),
        "device": bench.info["device"],
        "commit": args.commit or commit(),
        "jax": jax.__version__,
        "settings": {k: v for k, v in vars(args).items() if k not in NOT_RECORDED},
        "kernels": str(bench.info["kernels"]),
        "peaks": {
            "read_bytes_per_s": bench.peaks.read_bytes_per_s,
            "flops_per_s": bench.peaks.flops_per_s,
        },
        "startup_s": startup_s,
        "num_programs": bench.runner.num_programs,
        "compiles_after_ready": bench.runner.stats()["compiles_after_ready"],
        "cases": cases,
        "targets": targets(cases, args.geometry, args.quantization, args.against),
    }
    record(result, args.out)
    print(table(cases))


def targets(
    cases: list[dict[str, Any]], geometry: str, quantization: str | None, against: Path | None
) -> list[dict[str, Any]]:
    """What the plan wants of steps: near the floor, with adapters as without."""
    if quantization is not None:
        return _quantized_targets(cases, f"{geometry}, {quantization}", against)
    entries = []
    base = {case["rows"]: case for case in cases if case["kind"] == "base"}
    for case in cases:
        rows, kind = case["rows"], case["kind"]
        name = f"{geometry}, {rows} rows, {kind}"
        step_ms, floor_ms = case["decode_step_s"] * 1e3, case["decode_floor_s"] * 1e3
        limit = floor_ms * (1.25 if rows == 1 else 1.15)
        entries.append(
            target(
                "6", f"decode step, {name}", measured=step_ms, floor=floor_ms, limit=limit,
                unit="ms",
            )
        )  # fmt: skip
        if (geometry, rows) == ("llama-7b", 64):
            limit = ABSOLUTE_MS[kind]
            entries.append(
                target(
                    "6", f"decode step, {name}, stated", measured=step_ms, limit=limit, unit="ms"
                )
            )
        share, rate = case.get("prefill_floor_share"), case.get("prefill_tokens_per_s")
        if share is not None and kind == "base":
            entries.append(
                target(
                    "7", f"prefill, share of the floor, {name}", measured=share, limit=0.8,
                    unit="of the floor", floor=1.0, is_minimum=True,
                )
            )  # fmt: skip
        elif rate is not None and rows in base:
            entries.append(
                target(
                    "7", f"prefill, share of the base's rate, {name}", is_minimum=True, limit=0.9,
                    measured=rate / base[rows]["prefill_tokens_per_s"], unit="of base",
                )
            )  # fmt: skip
        if "profile" in case and case["profile"]["groups"]:
            entries.append(
                target(
                    "5", f"elementwise share of the step, {name}",
                    measured=elementwise_share(case["profile"]["groups"]), limit=0.05, unit="of it",
                )
            )  # fmt: skip
    return entries


def _quantized_targets(
    cases: list[dict[str, Any]], name: str, against: Path | None
) -> list[dict[str, Any]]:
    entries = []
    before = [] if against is None else json.loads(against.read_text())["cases"]
    wide_s = {(case["rows"], case["kind"]): case["decode_step_s"] for case in before}
    for case in cases:
        key, step_s = (case["rows"], case["kind"]), case["decode_step_s"]
        if key == (64, "base"):
            floor_ms = case["decode_floor_s"] * 1e3
            entries.append(
                target(
                    "4", f"decode step, {name}, 64 rows", measured=step_s * 1e3, floor=floor_ms,
                    limit=1.15 * floor_ms, unit="ms",
                )
            )  # fmt: skip
        if key == (1, "base") and key in wide_s:
            entries.append(
                target(
                    "4", f"one row, times as fast as bfloat16, {name}", is_minimum=True, limit=1.7,
                    measured=wide_s[key] / step_s, unit="times",
                )
            )  # fmt: skip
    return entries


def elementwise_share(groups: dict[str, dict[str, float]]) -> float:
    """Of the kernels' time, what is neither matmul nor attention nor LoRA."""
    total = sum(cost["us"] for cost in groups.values())
    named = ("matmul", "attention", "lora_shrink", "lora_expand", "lora_rows")
    return 1 - sum(groups[name]["us"] for name in named if name in groups) / total


def table(cases: list[dict[str, Any]]) -> str:
    """The cases for people to read."""
    lines = ["rows kind   decode ms  floor ms  ratio   prefill tok/s  share of floor   mixed ms"]
    for case in cases:
        prefill = case.get("prefill_tokens_per_s", float("nan"))
        share = case.get("prefill_floor_share", float("nan"))
        lines.append(
            f"{case['rows']:4d} {case['kind']:5s} {case['decode_step_s'] * 1e3:10.3f} "
            f"{case['decode_floor_s'] * 1e3:9.3f} {case['decode_over_floor']:6.3f} "
            f"{prefill:15.0f} {share:15.2f} {case.get('mixed_step_s', float('nan')) * 1e3:10.3f}"
        )
        for kind in ("profile", "mixed_profile", "prefill_profile"):
            for group, cost in sorted(case.get(kind, {}).get("groups", {}).items()):
                us, kernels = cost["us"], cost["kernels"]
                lines.append(f"     {kind:16s} {group:14s} {us:9.1f} us {kernels:7.1f} kernels")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    def ints(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-7b")
    parser.add_argument("--batches", type=ints, default=[1, 8, 64, 256])
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(RANKS))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--kernels")
    parser.add_argument("--quantization", choices=("int8", "fp8"))
    parser.add_argument("--against", type=Path, help="result of the same without quantization")
    parser.add_argument("--profile", type=int, help="rows of the batches to look into")
    parser.add_argument("--measure-peaks", action="store_true")
    parser.add_argument("--cache-dir")
    parser.add_argument("--commit", help="where the tree is not a repository")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
