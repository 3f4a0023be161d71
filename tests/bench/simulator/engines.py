"""Small engines on simulated clocks, for tests; no device, no JAX."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bench.simulator.cost import Cost
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import EngineDescription
from bench.trace import Request, default_tenant
from checkpoints.model_config import ModelConfig
from sloraj.config import PoolLayout, SchedulerConfig
from sloraj.runner.buckets import make_buckets

MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=512, hidden_size=128, intermediate_size=256,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, max_position_embeddings=2048,
)  # fmt: skip
LAYOUT = PoolLayout(num_layers=2, num_kv_heads=2, head_dim=32, page_size=4, tp=1, dtype="float32")


def description(**changes: Any) -> EngineDescription:
    """An engine of 4 rows and 16 tokens a step, unless told otherwise."""
    scheduler = dataclasses.replace(
        SchedulerConfig(
            num_pages=2000, page_size=4, max_model_len=1024, max_num_seqs=4,
            max_num_batched_tokens=16, max_adapter_slots=16, max_num_waiting=100_000, max_rank=64,
            vocab_size=512, eos_token_ids=(2,),
        ),
        **changes,
    )  # fmt: skip
    buckets = make_buckets(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, 4, 16)
    buckets = dataclasses.replace(buckets, lora_variants=("base", "attention", "all"))
    mixed = tuple(bucket.num_tokens for bucket in buckets.mixed)
    return EngineDescription(
        geometry="small", model=MODEL, layout=LAYOUT, buckets=buckets,
        scheduler=dataclasses.replace(scheduler, token_buckets=mixed),
    )  # fmt: skip


def device(**changes: float) -> DeviceModel:
    """Every part of a step costs something; names as in `bench.simulator.cost`."""
    return DeviceModel(
        device=Cost(
            {
                "bucket:decode-1": 0.004, "bucket:decode-4": 0.005, "bucket:mixed-16": 0.009,
                "decode:attention": 0.0005, "mixed:attention": 0.001, "context_tokens": 1e-6,
                "prompt_pairs": 2e-7, "decode:adapter_elements": 3e-9,
                "decode:adapter_products": 1e-9, "mixed:adapter_products": 2e-9,
                "num_installs": 0.0003,
            }
        ),
        execute=Cost({"step": 0.0007, "num_sampled": 2e-5}),
        between=Cost({"step": 0.0002, "num_resets": 5e-5}),
        bus_bytes_per_s=1e9, bus_latency_s=2e-5, head_start_s=0.0003,
        origin={"device": "imaginary"},
    )  # fmt: skip


def trace(
    seed: int, num: int, rate: float, num_adapters: int, output: tuple[int, int] = (1, 60)
) -> list[Request]:
    """Poisson arrivals; adapters, prompts of 1 to 40 tokens and answers uniform."""
    rng = np.random.RandomState(seed)
    arrivals = np.round(np.cumsum(rng.exponential(1 / rate, num)), 6).tolist()
    return [
        Request(
            arrival_s=arrival,
            adapter=(adapter := int(rng.randint(num_adapters)) if num_adapters else None),
            tenant=default_tenant(adapter), num_prompt_tokens=int(rng.randint(1, 41)),
            num_output_tokens=int(rng.randint(*output)),
        )
        for arrival in arrivals
    ]  # fmt: skip
