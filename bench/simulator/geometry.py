"""Engines that nobody has started: their description from a geometry and a few settings.

Numbers are resolved as `sloraj.build.build_runner` resolves them on a GPU; a recorded run brings
its own (`bench.step_trace.describe`).
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from bench.geometries import write_geometry
from bench.simulator.engine import EngineDescription
from checkpoints.hf_config import read_model_config
from checkpoints.model_config import ModelConfig
from sloraj.config import PoolLayout, SchedulerConfig, div_ceil
from sloraj.runner.buckets import make_buckets
from sloraj.runner.lora_variants import MODULES
from sloraj.runner.memory import INSTALL_BYTES_PER_STEP, ITEMSIZE

BLOCK_Q = 128  # of the GPU's ragged attention
GPU_BYTES = 138.1e9  # what the allocator of an H200 gives
WORKSPACE_BYTES = 6e9  # of programs and margin; grows with the model, which this leaves out


def model_config(geometry: str) -> ModelConfig:
    """Of a name in `bench.geometries`; raises KeyError if there is none."""
    with tempfile.TemporaryDirectory() as directory:
        return read_model_config(write_geometry(geometry, Path(directory)))


def weight_bytes(model: ModelConfig, itemsize: int = 2) -> int:
    """Of all parameters of a base, without norms and biases."""
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    shapes = [model.module_shape(module) for module in modules]
    layers = model.num_layers * sum(a * b for a, b in shapes)
    ends = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return (layers + ends) * itemsize


def device_pool_bytes(geometry: str, tp: int = 1) -> float:
    """What the weights leave of each of `tp` GPUs."""
    return GPU_BYTES - weight_bytes(model_config(geometry)) / tp - WORKSPACE_BYTES


def page_bytes(layout: PoolLayout) -> int:
    """Of a page on each device, all layers."""
    return layout.num_layers * layout.page_elems * ITEMSIZE[layout.dtype]


def describe_geometry(
    geometry: str,
    *,
    pool_bytes: float,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    max_model_len: int = 1024,
    max_rank: int = 64,
    max_adapter_slots: int = 1024,
    page_size: int = 16,
    tp: int = 1,
) -> EngineDescription:
    """An engine in bfloat16 with `pool_bytes` of pages on each of `tp` GPUs."""
    model = model_config(geometry)
    layout = PoolLayout(
        num_layers=model.num_layers, num_kv_heads=max(1, model.num_kv_heads // tp),
        head_dim=model.head_dim, page_size=page_size, tp=tp, dtype="bfloat16",
    )  # fmt: skip
    size = page_bytes(layout)
    buckets = make_buckets(max_num_seqs, max_num_batched_tokens, page_size, BLOCK_Q)
    buckets = dataclasses.replace(buckets, lora_variants=tuple(MODULES))
    scheduler = SchedulerConfig(
        num_pages=int(pool_bytes // size), page_size=page_size,
        max_model_len=max_model_len, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, max_adapter_slots=max_adapter_slots,
        max_num_waiting=1_000_000, max_rank=div_ceil(max_rank, tp) * tp,
        vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids,
        token_buckets=tuple(bucket.num_tokens for bucket in buckets.mixed),
        install_pages_per_step=max(1, INSTALL_BYTES_PER_STEP // size),
    )  # fmt: skip
    return EngineDescription(
        geometry=geometry, model=model, layout=layout, scheduler=scheduler, buckets=buckets
    )
