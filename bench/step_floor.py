"""The floor of a step: the sum over its kernels of what each must move and compute."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from bench.floors import Peaks
from checkpoints.model_config import ModelConfig

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")  # of the adapters that benchmarks use


def matmul_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of each base product of one layer; q, k, v are one, as are gate and up."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    return [(hidden, q_size + 2 * kv_size), (q_size, hidden), (hidden, 2 * mlp), (mlp, hidden)]


def decode_floor_s(
    config: ModelConfig,
    peaks: Peaks,
    *,
    context: int,
    ranks: Seq[int],
    weight_bytes: int = 2,
) -> float:
    """Seconds of a decode step of `len(ranks)` rows, each with an adapter of its own of that rank
    on q, k, v, o (0: the base). Activations are taken to stay in caches.
    """
    rows = len(ranks)
    layer = sum(
        peaks.floor_s(a * b * weight_bytes, 2 * rows * a * b) for a, b in matmul_shapes(config)
    )
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * 2
    layer += peaks.floor_s(rows * context * kv_bytes)
    shapes = [config.module_shape(module) for module in MODULES]
    layer += peaks.floor_s(sum(ranks) * sum(a + b for a, b in shapes) * 2)
    head = config.hidden_size * config.vocab_size
    return config.num_layers * layer + peaks.floor_s(head * 2, 2 * rows * head)


def prefill_floor_s(config: ModelConfig, peaks: Peaks, *, prompts: int, length: int) -> float:
    """Seconds of a step that computes `prompts` prompts of `length` tokens on the base model."""
    tokens = prompts * length
    layer = sum(peaks.floor_s(a * b * 2, 2 * tokens * a * b) for a, b in matmul_shapes(config))
    attended = prompts * length * (length + 1) / 2
    layer += peaks.floor_s(0, 4 * attended * config.num_heads * config.head_dim)
    head = config.hidden_size * config.vocab_size
    return config.num_layers * layer + peaks.floor_s(head * 2, 2 * prompts * head)
