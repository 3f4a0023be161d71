"""The share of the base's throughput that is left when adapters cost their bytes and operations.

For every step that a run really made: the floor of the same step on the base model, and with the
adapters that were in it, each read once and multiplied by its own tokens. Their ratio over all
steps is the ceiling of retention: what no kernel can beat on these batches. It leaves out what
else adapters cost (the pages that KV then lacks, the bus, the host), so those show as a distance
from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.batch_log import StepWork
from bench.floors import Peaks
from bench.step_floor import matmul_shapes
from checkpoints.model_config import ModelConfig

BYTES = 2  # of an element: bfloat16


def step_floor_s(
    config: ModelConfig, peaks: Peaks, step: StepWork, *, with_adapters: bool
) -> float:
    """Seconds that this step cannot be done in less than, kernel by kernel."""
    shapes = matmul_shapes(config)
    layer = sum(peaks.floor_s(a * b * BYTES, 2 * step.num_tokens * a * b) for a, b in shapes)
    kv_bytes = 2 * config.kv_size * BYTES
    layer += peaks.floor_s(step.context_tokens * kv_bytes)
    layer += peaks.floor_s(0, 4 * step.prompt_pairs * config.q_size)
    head = config.hidden_size * config.vocab_size
    total = config.num_layers * layer
    total += peaks.floor_s(head * BYTES, 2 * step.num_sampled * head)
    if with_adapters:  # counted over all layers
        total += peaks.floor_s(step.adapter_elements * BYTES, 2 * step.adapter_products)
    return total


def retention_ceiling(
    config: ModelConfig, steps: Sequence[StepWork], peaks: Peaks | None = None
) -> float | None:
    """Floors without adapters over floors with them, of these steps; None of no step."""
    peaks = peaks or Peaks()
    base = sum(step_floor_s(config, peaks, step, with_adapters=False) for step in steps)
    full = sum(step_floor_s(config, peaks, step, with_adapters=True) for step in steps)
    return base / full if full else None
