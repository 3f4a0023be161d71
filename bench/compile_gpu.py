"""Compile an engine's GPU programs without a GPU, and print what decides their cost.

    CUDA_VISIBLE_DEVICES=-1 JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
        python -m bench.compile_gpu --geometry llama-7b --only decode-64 mixed-2048

Needs the CUDA plugin and compiler packages, not the device. Per program: compile seconds, bytes
aliased (the donated pool), temporary bytes, whole-buffer copies, and kernels by kind. Kernels are
those of the H200's tuning table; XLA's own products are its cost model's choice, because autotuning
needs the device. What waits for what in the graph: XLA_FLAGS="--xla_dump_to=DIR" writes
`*.thunk_sequence_after_thunk_passes.txt`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from bench.geometries import GEOMETRIES, write_geometry
from checkpoints.hf_config import read_model_config
from pallas_kernels.dispatch import KernelShape, resolve_kernels
from sloraj.adapters.layout import max_adapter_pages
from sloraj.build import BLOCK_Q, lora_widths
from sloraj.config import PoolLayout
from sloraj.model.llama import abstract_model
from sloraj.model.step import StepSpec
from sloraj.parallel.mesh import local_kv_heads
from sloraj.runner import lora_variants
from sloraj.runner.buckets import make_buckets
from sloraj.runner.compiles import CompileJob
from sloraj.runner.jobs import make_jobs
from sloraj.runner.state import RunnerConfig

# GpuTargetConfig of an H200. driver_version matters: without it cuBLAS leaves the CUDA graphs.
H200 = """gpu_device_info{threads_per_block_limit:1024 threads_per_warp:32
  shared_memory_per_block:49152 shared_memory_per_core:233472
  shared_memory_per_block_optin:232448 core_count:132 threads_per_core_limit:2048
  registers_per_core_limit:65536 registers_per_block_limit:65536
  block_dim_limit_x:2147483647 block_dim_limit_y:65535 block_dim_limit_z:65535
  fpus_per_core:128 clock_rate_ghz:1.98 l2_cache_size:62914560 device_memory_size:150000000000
  memory_bandwidth:4800000000000 cuda_compute_capability{major:9} driver_version:"13.0.0"
  runtime_version:"13.0.0" compile_time_toolkit_version:"13.0.0"}
  platform_name:"CUDA" device_description_str:"NVIDIA H200" """


def abstract_jobs(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> list[CompileJob]:
    """The programs of an engine of this geometry on an abstract device."""
    with tempfile.TemporaryDirectory() as scratch:
        config = read_model_config(write_geometry(args.geometry, Path(scratch)))
    tp = mesh.size
    layout = PoolLayout(
        num_layers=config.num_layers, num_kv_heads=local_kv_heads(config, tp),
        head_dim=config.head_dim, page_size=16, tp=tp, dtype="bfloat16",
    )  # fmt: skip
    kernels = resolve_kernels(
        args.kernels, platform="gpu", device_kind="NVIDIA H200",
        shape=KernelShape(
            head_dim=config.head_dim, page_size=16, dtype="bfloat16",
            lora_widths=lora_widths(config, tp),
        ),
    )  # fmt: skip
    spec = StepSpec(
        config=config, tp=tp, page_size=16, max_rank=64, kernels=kernels,
        quantization=args.quantization,
    )  # fmt: skip
    model = abstract_model(spec, jnp.dtype("bfloat16"))
    runner_config = RunnerConfig(
        layout=layout, num_pages=args.num_pages, max_num_seqs=128, max_model_len=1024,
        max_adapter_slots=1024, max_adapter_pages=max_adapter_pages(layout, config, 64),
    )  # fmt: skip
    buckets = dataclasses.replace(
        make_buckets(128, 2048, 16, BLOCK_Q[kernels.ragged_attention]),
        lora_variants=tuple(lora_variants.MODULES),
    )
    return make_jobs(model, mesh, buckets, runner_config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-7b")
    parser.add_argument("--quantization", choices=("int8", "fp8"))
    parser.add_argument(
        "--kernels", choices=("xla", "triton", "mosaic", "bmm"), help="default: the best"
    )
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--num-pages", type=int, default=8000)
    parser.add_argument("--only", nargs="*", help="substrings of program names")
    args = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x1x{args.tp}"
    )
    mesh = topologies.make_mesh(topology, (args.tp,), ("tp",))
    # Pallas asks the abstract mesh which architecture it lowers for.
    target = AbstractMesh(
        (args.tp,), ("tp",), axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice("NVIDIA H200", 132, platform="gpu"),
    )  # fmt: skip
    for job in abstract_jobs(args, mesh):
        name = "-".join(map(str, job.key))
        if args.only and not any(part in name for part in args.only):
            continue
        started = time.perf_counter()
        with jax.sharding.use_abstract_mesh(target):
            compiled = job.program.lower(*job.arguments).compile()
        print(f"{name:30} {time.perf_counter() - started:6.1f} s  {describe(compiled)}", flush=True)


def describe(compiled: Any) -> str:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    targets = re.findall(r'custom_call_target="([^"]+)"', text)
    kinds = {kind: targets.count(kind) for kind in sorted(set(targets))}
    copies = re.findall(r"= (\S+) copy\(", text)
    return (
        f"aliased {memory.alias_size_in_bytes / 1e9:.2f} GB, "
        f"temporary {memory.temp_size_in_bytes / 1e6:.1f} MB, {len(copies)} copies "
        f"{sorted(set(copies))[:4]}, calls {kinds}"
    )


if __name__ == "__main__":
    main()
