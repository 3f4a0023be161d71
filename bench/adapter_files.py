"""PEFT adapter directories with random weights, for benchmarks that read adapters from disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from bench.settings import MODULES
from checkpoints.model_config import ModelConfig


def write_adapters(
    folder: Path, config: ModelConfig, ranks: Sequence[int], count: int
) -> list[str]:
    """`count` directories, the ranks in turn, bfloat16 on q, k, v, o; their paths.

    Adapters of one rank differ in one value: enough for each to be a version of its own.
    """
    files = {rank: _file(config, rank) for rank in ranks}
    paths = []
    for index in range(count):
        rank = ranks[index % len(ranks)]
        header, body = files[rank]
        body[0] = np.float32(index + 1) * np.float32(2**-20)
        directory = folder / f"adapter-{index}"
        directory.mkdir()
        with open(directory / "adapter_model.safetensors", "wb") as file:
            file.write(header)
            file.write(body.view(np.uint8).data)
        (directory / "adapter_config.json").write_text(json.dumps(_config(rank)))
        paths.append(str(directory))
    return paths


def _file(config: ModelConfig, rank: int) -> tuple[bytes, np.ndarray]:
    """Header and weights of a safetensors file."""
    entries, end = {}, 0
    for layer in range(config.num_layers):
        for name in MODULES:
            size_in, size_out = config.module_shape(name)
            for half, shape in (("A", [rank, size_in]), ("B", [size_out, rank])):
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{half}.weight"
                start, end = end, end + 2 * shape[0] * shape[1]
                entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(rank)
    body = (rng.random(end // 2, np.float32) * np.float32(2e-3) - np.float32(1e-3)).astype(
        ml_dtypes.bfloat16
    )
    return len(text).to_bytes(8, "little") + text, body


def _config(rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": list(MODULES),
        "bias": "none",
        "base_model_name_or_path": None,
    }
